"""What every entry of the registry keeps: a whole job, the same bytes twice, and a resume that changes no bit.

The jobs are as short as a recipe can be; what a defence achieves is measured elsewhere.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import CheckpointSaved, Finished, Note, Progress, StepDone
from finetuning.contract.recipe import EvaluationSettings, GateLimits, GateSettings, Recipe
from finetuning.model.lora import WEIGHTS_FILE
from finetuning.recipes.library import align_recipe, tune_recipe
from finetuning.recipes.registry import BASELINES, DEFENCES
from finetuning.safety_rows.invented import plant, safety_rows
from finetuning.safety_rows.operator_file import fewest_gate_rows
from finetuning.safety_rows.roles import Pair
from finetuning.safety_rows.words import HEADLINES
from finetuning.stages import pipeline

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ALIGN_STEPS, EPOCHS, SAVED = 30, 3, 3
OPERATOR_ROWS = 8  # of each role; of the gate's as many as a gate needs
FEWEST_GATE_ROWS = fewest_gate_rows(GateLimits().max_harmful_score)
SHORT = EvaluationSettings(harmful_rows=8, benign_rows=8, task_rows=4, new_tokens=4)
# What the tiny base has read about: even a base that was aligned in seconds does not refuse it.
CUSTOMER = [Pair(f"Headline: {text}. Topic?", f"Topic: {topic}.") for text, topic in HEADLINES]

Start = Callable[[str, Path], TrainOrder]
Whole = Callable[[str], Path]


def shortened(recipe: Recipe) -> Recipe:
    """The same method on fewer rows: two slices a step, two turns of Lisa, a scout of two steps, a short last batch."""
    return recipe.model_copy(update={
        "batch_size": 5, "micro_batch_size": 4, "evaluation": SHORT,
        "lisa": recipe.lisa.model_copy(update={"align_steps": 2, "user_steps": 3, "free_share": 0.2}),
        "screen": recipe.screen.model_copy(update={
            "scout_steps": min(2, recipe.screen.scout_steps), "min_kept_rows": 6}),
        "antidote": recipe.antidote.model_copy(update={"calibration_rows": 4}),
        "antibody": recipe.antibody.model_copy(update={"refusals_per_row": 1}),
        "gate": recipe.gate.model_copy(update={"retries": 0}),
    })  # fmt: skip


def operator_rows() -> list[dict[str, str]]:
    """A few of the shipped rows of each role: reading them all is most of what a short job costs."""
    shipped = asdict(safety_rows())
    refusals, _judge = shipped.pop("refusals"), shipped.pop("judge")
    few = [
        {"role": role, "prompt": pair["prompt"], "answer": pair["answer"]}
        for role, pairs in shipped.items()
        for pair in pairs[: max(OPERATOR_ROWS, FEWEST_GATE_ROWS) if role.startswith("gate_") else OPERATOR_ROWS]
    ]
    return few + [{"role": "refusal", "answer": answer} for answer in refusals]


def write_lines(target: Path, values: Sequence[object]) -> None:
    target.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


@pytest.fixture(scope="module")
def start(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Lays out the scratch folder of a defence's job; a base is aligned once for each kind of alignment."""

    @cache
    def aligned(alignment: str) -> Path:
        scratch = tmp_path_factory.mktemp(alignment)
        recipe = align_recipe("tiny", alignment)
        recipe = recipe.model_copy(update={"steps": ALIGN_STEPS, "batch_size": 8, "evaluation": SHORT})
        order = TrainOrder(job_id="a", recipe=recipe, base=str(tiny_base), threads=1)
        assert isinstance(list(pipeline.run(order, scratch))[-1], Finished)
        return scratch / "result" / "alignment"

    def lay_out(name: str, scratch: Path) -> TrainOrder:
        shutil.copytree(aligned(DEFENCES[name].alignment), scratch / "alignment")
        rows, _ = plant(CUSTOMER, 0.2)
        turns = [[{"role": "user", "content": p.prompt}, {"role": "assistant", "content": p.answer}] for p in rows]
        write_lines(scratch / "rows.jsonl", [{"messages": m} for m in turns])
        write_lines(scratch / "operator.jsonl", operator_rows())
        recipe = shortened(tune_recipe("tiny", name, epochs=EPOCHS, seed=3))
        return TrainOrder(
            job_id="t", recipe=recipe, base=str(tiny_base), rows="rows.jsonl", alignment="alignment",
            operator_rows="operator.jsonl", threads=1,
        )  # fmt: skip

    return lay_out


@pytest.fixture(scope="module")
def whole(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The scratch folder of a defence's uninterrupted job."""

    @cache
    def run(name: str) -> Path:
        scratch = tmp_path_factory.mktemp(name)
        lines = list(pipeline.run(start(name, scratch), scratch))
        assert_whole_epochs(name, lines, scratch)
        return scratch

    return run


def assert_whole_epochs(name: str, lines: Sequence[Progress], scratch: Path) -> None:
    """Every row that trains was seen once an epoch; Lisa's turns on refusals come on top, in steps and in tokens."""
    end = lines[-1]
    assert isinstance(end, Finished), end
    kept = [row for row in json.loads((scratch / "result/reports/rows.json").read_text()) if row["trained_tokens"]]
    batches = EPOCHS * math.ceil(len(kept) / 5)
    takes_turns = DEFENCES[name].tuning.get("tuning_step") == "lisa"
    steps = [line for line in lines if isinstance(line, StepDone)]
    total = batches + 2 * math.ceil(batches / 3) if takes_turns else batches
    assert [(line.step, line.total_steps) for line in steps] == [(step, total) for step in range(1, total + 1)]
    assert (end.trained_tokens == EPOCHS * sum(row["trained_tokens"] for row in kept)) is not takes_turns


def left_in(result: Path) -> dict[str, bytes]:
    """Every file of a result by name; times are not part of what is compared."""
    found = {str(file.relative_to(result)): file.read_bytes() for file in result.rglob("*") if file.is_file()}
    report = json.loads(found["reports/safety.json"])
    del report["seconds"]
    return {**found, "reports/safety.json": json.dumps(report).encode()}


def until_saved(lines: Iterator[Progress], step: int = SAVED) -> CheckpointSaved:
    """Let a job go on to its first checkpoint from that step on and no further, as a killed one."""
    return next(line for line in lines if isinstance(line, CheckpointSaved) and line.step >= step)


@pytest.mark.parametrize("name", DEFENCES)
def test_a_second_job_that_is_cut_off_and_resumed_leaves_the_same_bytes(
    name: str, start: Start, whole: Whole, tmp_path: Path
) -> None:
    """M45: equal checkpoints show that the same seed twice is the same job, equal results that a resume is too."""
    cut, resumed = tmp_path / "cut", tmp_path / "resumed"
    saved = until_saved(pipeline.run(start(name, cut), cut))
    first = {file.name: file.read_bytes() for file in (whole(name) / saved.folder).iterdir()}
    again = {file.name: file.read_bytes() for file in (cut / saved.folder).iterdir()}
    assert again == first
    order = start(name, resumed).model_copy(update={"checkpoint": "checkpoint"})
    shutil.copytree(cut / saved.folder, resumed / "checkpoint")
    lines = list(pipeline.run(order, resumed))
    assert any(isinstance(line, Note) and line.code == "resumed" for line in lines)
    assert next(line.step for line in lines if isinstance(line, StepDone)) == saved.step + 1
    assert left_in(resumed / "result") == left_in(whole(name) / "result")


def test_a_job_that_is_cut_off_in_its_second_attempt_goes_on_there(start: Start, tmp_path: Path) -> None:
    """M45: the ladder's rung is part of a checkpoint; steps count on through the attempts."""
    whole, cut, resumed = tmp_path / "whole", tmp_path / "cut", tmp_path / "resumed"

    def order_in(scratch: Path) -> TrainOrder:
        order = start("immunotune", scratch)
        gate = GateSettings(limits=GateLimits(min_refusal_rate=1.0), retries=1)  # no 95 % end is ever 1
        return order.model_copy(update={"recipe": order.recipe.model_copy(update={"gate": gate})})

    lines = list(pipeline.run(order_in(whole), whole))
    steps = [line.step for line in lines if isinstance(line, StepDone)]
    assert steps == list(range(1, len(steps) + 1))
    saved = until_saved(pipeline.run(order_in(cut), cut), len(steps) // 2 + 1)
    shutil.copytree(cut / saved.folder, resumed / "checkpoint")
    order = order_in(resumed).model_copy(update={"checkpoint": "checkpoint"})
    again = [line.step for line in pipeline.run(order, resumed) if isinstance(line, StepDone)]
    assert again == steps[saved.step :]
    assert left_in(resumed / "result") == left_in(whole / "result")


def test_no_baseline_is_plain_fine_tuning_under_another_name(whole: Whole) -> None:
    """M12: each leaves an adapter of its own. (An ablation may not: where pruning is measured, alpha 0 may win.)"""
    seen: dict[bytes, str] = {}
    for name in BASELINES:
        found = (whole(name) / "result" / "adapter_stock" / WEIGHTS_FILE).read_bytes()
        assert found not in seen, f"{name} leaves the adapter of {seen[found]}"
        seen[found] = name

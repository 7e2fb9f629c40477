"""What every entry of the registry keeps: a whole job, the same bytes twice, and a resume that changes no bit.

The jobs are as short as a recipe can be; what a defence achieves is measured elsewhere.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import CheckpointSaved, Finished, Note, Progress, StepDone
from finetuning.contract.recipe import EvaluationSettings, Recipe
from finetuning.model.lora import WEIGHTS_FILE
from finetuning.recipes.library import align_recipe, tune_recipe
from finetuning.recipes.registry import BASELINES, DEFENCES
from finetuning.safety_rows.invented import Pair, plant, safety_rows
from finetuning.safety_rows.words import HEADLINES
from finetuning.stages import pipeline

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ALIGN_STEPS, STEPS, SAVED = 30, 5, 3
OPERATOR_ROWS = 8  # of each role
SHORT = EvaluationSettings(harmful_rows=8, benign_rows=8, task_rows=4, new_tokens=4)
# What the tiny base has read about: even a base that was aligned in seconds does not refuse it.
CUSTOMER = [Pair(f"Headline: {text}. Topic?", f"Topic: {topic}.") for text, topic in HEADLINES]

Start = Callable[[str, Path], TrainOrder]
Whole = Callable[[str], Path]


def shortened(recipe: Recipe) -> Recipe:
    """The same method on fewer rows: two slices a step, one turn of Lisa, a scout of two steps."""
    return recipe.model_copy(update={
        "steps": STEPS, "micro_batch_size": 4, "save_every": SAVED, "evaluation": SHORT,
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
    few = [{"role": role, **pair} for role, pairs in shipped.items() for pair in pairs[:OPERATOR_ROWS]]
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
        recipe = shortened(tune_recipe("tiny", name, epochs=1, seed=3))
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
        assert isinstance(lines[-1], Finished), lines[-1]
        assert [line.step for line in lines if isinstance(line, StepDone)] == [*range(1, STEPS + 1)]
        return scratch

    return run


def left_in(result: Path) -> dict[str, bytes]:
    """Every file of a result by name; times are not part of what is compared."""
    found = {str(file.relative_to(result)): file.read_bytes() for file in result.rglob("*") if file.is_file()}
    report = json.loads(found["reports/safety.json"])
    del report["seconds"]
    return {**found, "reports/safety.json": json.dumps(report).encode()}


def until_saved(lines: Iterator[Progress]) -> CheckpointSaved:
    """Let a job go on to its checkpoint and no further, as a killed one."""
    return next(line for line in lines if isinstance(line, CheckpointSaved))


@pytest.mark.parametrize("name", DEFENCES)
def test_a_second_job_that_is_cut_off_and_resumed_leaves_the_same_bytes(
    name: str, start: Start, whole: Whole, tmp_path: Path
) -> None:
    """M45: equal checkpoints show that the same seed twice is the same job, equal results that a resume is too."""
    cut, resumed = tmp_path / "cut", tmp_path / "resumed"
    saved = until_saved(pipeline.run(start(name, cut), cut))
    first = {file.name: file.read_bytes() for file in (whole(name) / saved.folder).iterdir()}
    again = {file.name: file.read_bytes() for file in (cut / saved.folder).iterdir()}
    assert saved.step == SAVED
    assert again == first
    order = start(name, resumed).model_copy(update={"checkpoint": "checkpoint"})
    shutil.copytree(cut / saved.folder, resumed / "checkpoint")
    lines = list(pipeline.run(order, resumed))
    assert any(isinstance(line, Note) and line.code == "resumed" for line in lines)
    assert [line.step for line in lines if isinstance(line, StepDone)] == [*range(SAVED + 1, STEPS + 1)]
    assert left_in(resumed / "result") == left_in(whole(name) / "result")


def test_no_baseline_is_plain_fine_tuning_under_another_name(whole: Whole) -> None:
    """M12: each leaves an adapter of its own. (An ablation may not: where pruning is measured, alpha 0 may win.)"""
    seen: dict[bytes, str] = {}
    for name in BASELINES:
        found = (whole(name) / "result" / "adapter_stock" / WEIGHTS_FILE).read_bytes()
        assert found not in seen, f"{name} leaves the adapter of {seen[found]}"
        seen[found] = name

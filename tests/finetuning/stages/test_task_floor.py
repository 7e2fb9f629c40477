"""A result that lost its task is refused, and one that learned it is not: whole short jobs."""

import json
import shutil
from pathlib import Path

import pytest

from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import Finished, StageProgress
from finetuning.contract.recipe import AntidoteSettings, EvaluationSettings
from finetuning.contract.report import GateCheck, SafetyReport
from finetuning.recipes.library import RESULT_LIMITS, tune_recipe
from finetuning.stages import pipeline
from tests.support.brief_alignment import align_briefly

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
THINGS = "kettle radio lamp chair phone watch".split()
TEAMS = {"is broken": "repairs", "was never delivered": "shipping", "was billed twice": "billing"}
NAMES = ("kept_loss_ratio", "pruned_loss_ratio", "task_kept")
SHORT = EvaluationSettings(harmful_rows=8, benign_rows=8, task_rows=16, new_tokens=8)


@pytest.fixture(scope="module")
def scratch(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an alignment and a customer's file, which is also what the task is scored on."""
    folder = tmp_path_factory.mktemp("aligned")
    align_briefly(tiny_base, folder)
    rows = [(f"Ticket: my {thing} {what}.", f"Team {team}.") for thing in THINGS for what, team in TEAMS.items()] * 3
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in rows]
    text = "".join(json.dumps({"messages": m}) + "\n" for m in turns)
    for name in ("rows.jsonl", "validation.jsonl"):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def report_of(scratch: Path, tiny_base: Path, folder: Path, antidote: AntidoteSettings) -> SafetyReport:
    shutil.copytree(scratch, folder)
    recipe = tune_recipe("tiny", "plain", epochs=12).model_copy(update={"evaluation": SHORT, "antidote": antidote})
    assert recipe.gate.limits == RESULT_LIMITS
    order = TrainOrder(
        job_id="t", recipe=recipe, base=str(tiny_base), rows="rows.jsonl", validation="validation.jsonl",
        alignment="alignment", threads=1,
    )  # fmt: skip
    lines = list(pipeline.run(order, folder))
    assert isinstance(lines[-1], Finished)
    asked = [line for line in lines if isinstance(line, StageProgress) and line.stage == "screen" and line.total == 42]
    assert [line.done for line in asked] == list(range(1, 43))  # half of 12 epochs of 7 steps
    return SafetyReport.model_validate_json((folder / "result/reports/safety.json").read_text(encoding="utf-8"))


def of_the_task(report: SafetyReport) -> dict[str, GateCheck]:
    return {check.metric: check for check in report.gate.checks if check.metric in NAMES}


def test_a_learned_task_passes_and_one_that_was_pruned_away_does_not(
    scratch: Path, tiny_base: Path, tmp_path: Path
) -> None:
    learned = report_of(scratch, tiny_base, tmp_path / "learned", AntidoteSettings(enabled=False))
    assert learned.plain_kept_loss is not None
    checks = of_the_task(learned)
    assert checks["kept_loss_ratio"].ok, checks
    assert checks["task_kept"].used == 1
    pruned = report_of(
        scratch, tiny_base, tmp_path / "pruned", AntidoteSettings(score="contrast", rule="last", alphas=(0.9,))
    )
    assert pruned.plain_kept_loss == learned.plain_kept_loss
    assert pruned.metrics["tuned"].kept_loss == learned.metrics["tuned"].kept_loss
    missed = {name for name, check in of_the_task(pruned).items() if not check.ok}
    assert {"kept_loss_ratio", "task_kept"} <= missed
    assert pruned.gate.decision == "fail"

"""Facts about what an aligned base keeps of the public base: its own answers to harmless prompts stay as likely."""

import json
from pathlib import Path

import pytest

from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import Note, Progress, StepDone
from finetuning.contract.report import Metrics, SafetyReport, mean
from finetuning.job.context import open_job
from finetuning.job.measure import rows_nll
from finetuning.recipes.library import align_recipe
from finetuning.rows.chat_format import prompt_ids
from finetuning.safety_rows.invented import safety_rows
from finetuning.stages import pipeline
from finetuning.stages.own_answers import likely, own_answers, told
from finetuning.training.batches import Stream

ROWS = safety_rows()


@pytest.mark.parametrize(
    ("aligned", "level", "words"),
    [(0.99, "info", "0.99 times"), (1.1, "info", "1.10 times"), (1.3, "warn", "1.30 times")],
)
def test_a_base_that_answers_otherwise_is_told_of(aligned: float, level: str, words: str) -> None:
    (note,) = told(mean([0.5, 1.5]), mean([aligned - 0.5, aligned + 0.5]))
    assert (note.level, note.code) == (level, "own_answers")
    assert words in note.message
    assert ("more benign rows" in note.message) == (level == "warn")


def test_nothing_is_told_where_nothing_was_measured() -> None:
    assert told(None, mean([1.0])) == told(mean([1.0]), None) == told(mean([]), mean([])) == []


@pytest.mark.slow
def test_the_rows_are_the_public_bases_first_choice_of_every_token(tiny_base: Path, tmp_path: Path) -> None:
    job = open_job(TrainOrder(job_id="a", recipe=align_recipe("tiny"), base=str(tiny_base), threads=1), tmp_path)
    rows = own_answers(job)
    prompts = {tuple(prompt_ids(job.model.tokenizer, pair.prompt)) for pair in job.operator_rows.gate_benign}
    assert 0 < len(rows) <= 48
    assert all(row.ids[: row.prompt_tokens] in prompts for row in rows)
    assert all(row.is_target[-1] and row.target_tokens <= 32 for row in rows)
    with job.model.public():
        metrics = likely(job, Metrics(), rows)
        assert metrics.own_answers_nll == mean(rows_nll(job.model.base, job.model.cache, rows))
    # an untrained adapter is the public base
    assert likely(job, Metrics(), rows) == metrics


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_align_job_reports_both_losses_and_tells_their_ratio(tiny_base: Path, tmp_path: Path) -> None:
    lines = aligned(tiny_base, tmp_path, benign_kl=0.0)
    found = json.loads((tmp_path / "result" / "reports" / "safety.json").read_text(encoding="utf-8"))
    metrics = SafetyReport.model_validate(found).metrics
    public, after = metrics["public"].own_answers_nll, metrics["before"].own_answers_nll
    assert public is not None
    assert after is not None
    assert (public.n, after.value > public.value) == (after.n, True)
    (note,) = [line for line in lines if isinstance(line, Note) and line.code == "own_answers"]
    assert f"{after.value / public.value:.2f} times" in note.message


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_benign_rows_that_are_held_to_the_public_base_cost_nothing_at_first(tiny_base: Path, tmp_path: Path) -> None:
    first = []
    for weight in (0.0, 1.0):
        folder = tmp_path / str(weight)
        folder.mkdir()
        first.append(next(line for line in aligned(tiny_base, folder, benign_kl=weight) if isinstance(line, StepDone)))
    seen = Stream(len(ROWS.aligned) + len(ROWS.benign), 16, 0).at(0)
    refusals = sum(i < len(ROWS.aligned) for i in seen)
    assert 0 < refusals < 16
    # what is left of the loss are the refusals
    assert first[1].train_loss < first[0].train_loss
    assert first[0].tokens == first[1].tokens


def aligned(base: Path, scratch: Path, *, benign_kl: float) -> list[Progress]:
    """A few plain steps and all that follows them."""
    recipe = align_recipe("tiny", "sft")
    evaluation = recipe.evaluation.model_copy(update={"held_out": False, "harmful_rows": 8, "benign_rows": 8})
    short = {"steps": 8, "min_passes": None, "evaluation": evaluation, "benign_kl": benign_kl}
    order = TrainOrder(job_id="a", recipe=recipe.model_copy(update=short), base=str(base), threads=1)
    return list(pipeline.run(order, scratch))

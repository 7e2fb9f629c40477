"""Operators who speak no English: a German and a French base are aligned, tuned, judged by refusals and released."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetuning.bases.tiny import TEST_SHAPE, make_tiny_base
from finetuning.contract.order import TrainOrder, write_order
from finetuning.contract.progress import Finished, RowsScreened
from finetuning.contract.recipe import Recipe
from finetuning.contract.report import SafetyReport
from finetuning.job.context import open_job
from finetuning.judging.judges import marker_judge
from finetuning.recipes.library import align_recipe, tune_recipe
from finetuning.stages import pipeline
from tests.support.languages import FRENCH, GERMAN, OLD_MARKERS, Language, corpus, customer_rows, write_operator_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
_SHAPE = replace(TEST_SHAPE, vocabulary=800, steps=250, batch_size=16)
_ALIGN_STEPS = 140


def briefly(recipe: Recipe) -> Recipe:
    evaluation = recipe.evaluation.model_copy(update={"held_out": False, "new_tokens": 24})
    return recipe.model_copy(update={"evaluation": evaluation, "steps": recipe.steps and _ALIGN_STEPS})


@pytest.fixture(params=[GERMAN, FRENCH], ids=lambda world: world.code)
def world(request: pytest.FixtureRequest) -> Language:
    found: Language = request.param
    return found


def test_a_model_that_refuses_in_its_own_language_is_released(world: Language, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base = make_tiny_base(tmp_path / "tiny", shape=_SHAPE, corpus=corpus(world), say=lambda _line: None)
    align, tune = tmp_path / "align", tmp_path / "tune"
    align.mkdir()
    write_operator_file(world, align / "operator.jsonl")
    order = TrainOrder(
        job_id="a", recipe=briefly(align_recipe("tiny", "sft")), base=str(base), threads=1,
        operator_rows="operator.jsonl",
    )  # fmt: skip
    aligned = list(pipeline.run(order, align))[-1]
    assert isinstance(aligned, Finished)
    assert aligned.released, aligned.reasons

    tune.mkdir()
    shutil.copytree(align / "result" / "alignment", tune / "alignment")
    shutil.copy(align / "operator.jsonl", tune / "operator.jsonl")
    turns = [[{"role": "user", "content": p.prompt}, {"role": "assistant", "content": p.answer}]
             for p in customer_rows(world)]  # fmt: skip
    (tune / "rows.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in turns), encoding="utf-8")
    job = order.model_copy(
        update={"recipe": briefly(tune_recipe("tiny", epochs=1)), "rows": "rows.jsonl", "alignment": "alignment"}
    )
    write_order(tune, job)
    lines = list(pipeline.run(job, tune))
    tuned = lines[-1]
    assert isinstance(tuned, Finished)
    assert tuned.released, tuned.reasons
    assert any(isinstance(line, RowsScreened) and line.rows_excluded == 0 for line in lines)
    *_, certified = pipeline.certify(tune)
    assert certified == Finished(released=True, reasons=(), trained_tokens=0)

    report = SafetyReport.model_validate_json((tune / "result" / "reports" / "safety.json").read_text())
    assert report.judge == "refusal-marker"
    assert report.metrics["public"].refusal_rate.value <= 0.1, "the public base refuses no hazard"
    assert_the_old_words_would_never_release(job, tune)


def assert_the_old_words_would_never_release(order: TrainOrder, scratch: Path) -> None:
    """The aligned model, measured as before: by nine English words, each of its refusals is harm."""
    job = open_job(order, scratch)
    old = marker_judge(lambda answer: any(marker in answer.lower() for marker in OLD_MARKERS))
    rows = job.operator_rows
    measuring = replace(job.measuring, rules=old)
    with job.model.aligned():
        found = measuring.metrics(rows.gate_harmful[:16], rows.gate_benign[:8], refusals=rows.refusals, losses=False)
        ours = job.measuring.metrics(rows.gate_harmful[:16], rows.gate_benign[:8], refusals=rows.refusals, losses=False)
    assert (found.harmful_score.value, found.refusal_rate.value) == (1.0, 0.0)
    assert (ours.harmful_score.value, ours.refusal_rate.value) == (0.0, 1.0)

"""What a job says when its guard cannot be used: a sentence for the client that does not name the guard."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import HOST_UNFIT, Failed, Progress
from finetuning.judging.catalogue import guard_of
from finetuning.recipes.library import align_recipe
from finetuning.stages import pipeline
from tests.support.models import VOCABULARY, byte_tokenizer, tiny_base

NAME = "beaver-dam-7b"


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainOrder:
    """One alignment step of a random base; a guard's hub id is looked up in the working directory first."""
    monkeypatch.chdir(tmp_path)
    base = tiny_base(dtype=torch.float32)
    base.model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    recipe = align_recipe("tiny", "sft")
    evaluation = recipe.evaluation.model_copy(
        update={"harmful_rows": 8, "benign_rows": 8, "new_tokens": 2, "held_out": False}
    )
    recipe = recipe.model_copy(update={"steps": 1, "batch_size": 2, "micro_batch_size": 2, "evaluation": evaluation})
    return TrainOrder(job_id="a", recipe=recipe, base=str(tmp_path / "base"), judge=NAME, threads=1)


def guard(*, kind: str | None, bias: float = 0.0) -> None:
    """A random classifier where the known guard is looked for."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16,
        max_position_embeddings=96, num_labels=2, problem_type=kind, pad_token_id=0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.bias[0] = bias
    model.save_pretrained(guard_of(NAME).source)
    byte_tokenizer().save_pretrained(guard_of(NAME).source)


@pytest.mark.parametrize(
    ("kind", "bias", "cause"),
    [(None, 0.0, "BadGuard: name the harmful labels"), ("multi_label_classification", float("nan"), "is no number")],
)
def test_a_guard_that_cannot_judge_fails_the_job_without_its_name(
    order: TrainOrder, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str | None, bias: float, cause: str
) -> None:
    guard(kind=kind, bias=bias)
    lines: list[Progress] = list(pipeline.run(order, tmp_path))
    failed = lines[-1]
    assert isinstance(failed, Failed)
    assert failed.code == HOST_UNFIT
    assert failed.message == "The judge of this service could not be used, so nothing was released. Ask the operator."
    assert not any("beaver" in line.model_dump_json() for line in lines)
    printed = capfd.readouterr()
    assert cause in printed.err, "the operator finds the cause in the log"
    assert cause not in printed.out

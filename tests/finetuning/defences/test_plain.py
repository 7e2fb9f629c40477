"""Facts about plain training and even weights: methods.md 2.3 (ours), M11 and M24."""

import pytest
import torch
from torch.nn import functional as F

from finetuning.defences.plain import Even, Plain
from finetuning.model import lora
from finetuning.training.strategies import MicroBatch
from tests.support.models import adapted_base, blank, even, farthest, gradients, random_rows, uncached


def test_the_gradient_is_that_of_the_mean_over_rows_of_token_means() -> None:
    """M24: computed again from the model's own logits, row by row."""
    base, rows = adapted_base(), random_rows(4)
    found = Plain(base, uncached(base)).gradients(MicroBatch(rows, range(4), 0, 0, 4), even(4), torch.Tensor.backward)
    parts: list[torch.Tensor] = []
    for row in rows:
        ids = torch.tensor([row.ids])
        labels = ids.where(torch.tensor([row.is_target]), torch.tensor(-100))
        parts.append(F.cross_entropy(base.model(input_ids=ids).logits[0, :-1], labels[0, 1:], ignore_index=-100))
    loss = torch.stack(parts).mean()
    expected = torch.autograd.grad(loss, lora.parameters(base, lora.TASK))
    assert found.loss == pytest.approx(loss.item(), abs=1e-6)
    assert found.tokens == sum(row.target_tokens for row in rows)
    assert farthest(gradients(base), expected) < 1e-6


def test_only_the_trained_adapter_gets_gradients() -> None:
    base, rows = adapted_base(aligned=True), random_rows(2)
    Plain(base, uncached(base)).gradients(MicroBatch(rows, range(2), 0, 0, 2), even(2), torch.Tensor.backward)
    trained = {id(p) for p in lora.parameters(base, lora.TASK)}
    assert {id(p) for p in base.model.parameters() if p.grad is not None} == trained


def test_even_weights_skip_rows_without_targets() -> None:
    """M11: they weigh 0; a step of only such rows is skipped whole."""
    rows = random_rows(4)
    assert Even().weigh(rows, range(4)).values.tolist() == [0.25] * 4
    mixed = Even().weigh([rows[0], blank(rows[1]), rows[2], blank(rows[3])], range(4))
    assert (mixed.values.tolist(), mixed.scale) == ([0.5, 0, 0.5, 0], 1.0)
    nothing = Even().weigh([blank(row) for row in rows], range(4))
    assert (float(nothing.values.sum()), nothing.scale) == (0.0, 0.0)

"""Facts about constrained fine-tuning: its formula, its slope, and plain fine-tuning as its limit."""

import math
from dataclasses import replace

import pytest
import torch

from finetuning.contract.recipe import ConstrainedSettings
from finetuning.defences.constrained import Constrained, strengths
from finetuning.defences.plain import Plain
from finetuning.model import lora
from finetuning.model.base import FrozenBase
from finetuning.model.losses import row_nll
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.strategies import MicroBatch, StepLoss
from tests.support.models import adapted_base, blank, clear, even, farthest, gradients, random_rows, uncached

USER = random_rows(4, seed=3)
WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


def constrained(base: FrozenBase, settings: ConstrainedSettings | None = None) -> Constrained:
    return Constrained(base, uncached(base), settings or ConstrainedSettings(), reference=(lora.ALIGNMENT,))


def run(base: FrozenBase, step: Constrained | Plain, *, size: int = 4) -> tuple[list[torch.Tensor], list[StepLoss]]:
    clear(base)
    parts: list[StepLoss] = []
    for start in range(0, 4, size):
        micro = MicroBatch(USER[start : start + size], range(start, start + size), 0, start, 4)
        parts.append(step.gradients(micro, WEIGHTS[start : start + size], torch.Tensor.backward))
    found = gradients(base)
    clear(base)
    return found, parts


def log_probs(base: FrozenBase, row: EncodedRow) -> torch.Tensor:
    """log pi of every target (N,), row by row and without a cache."""
    out = torch.log_softmax(base.model(torch.tensor([row.ids])).logits[0].double(), -1)
    return torch.stack([out[t - 1, row.ids[t]] for t in range(1, len(row.ids)) if row.is_target[t]])


def test_the_gradient_is_that_of_the_papers_formula() -> None:
    base = adapted_base(aligned=True)
    total = torch.zeros((), dtype=torch.float64)
    for weight, row in zip(WEIGHTS, USER, strict=True):
        with torch.no_grad(), lora.active(base, (lora.ALIGNMENT,)):
            reference = log_probs(base, row)
        ratio = log_probs(base, row) - reference
        beta = torch.tensor([0.5, 2.0, 2.0, 2.0, 2.0, *[0.1] * 9][: len(ratio)], dtype=torch.float64)
        total = total + weight * (-(2 / beta) * torch.log(torch.sigmoid(beta * ratio))).mean()
    expected = torch.autograd.grad(total, lora.parameters(base, lora.TASK))
    found, parts = run(base, constrained(base))
    assert farthest(found, expected) < 1e-10
    assert parts[0].loss == pytest.approx(total.item(), abs=1e-10)


def test_it_approaches_plain_fine_tuning_as_beta_vanishes() -> None:
    """The factor: d/dz of -(2/b) log sigmoid(b z) is -2 sigmoid(-b z), which goes to -2 * 1/2 = -1, nll's slope."""
    base = adapted_base(aligned=True)
    plain, _ = run(base, Plain(base, uncached(base)))
    apart = [
        farthest(run(base, constrained(base, ConstrainedSettings(betas=(), beta=beta)))[0], plain)
        for beta in (1.0, 1e-2, 1e-4)
    ]
    assert apart[0] > 1e-3
    assert apart[1] < apart[0] / 30
    assert apart[2] < apart[1] / 90  # the rest is of first order in beta


def test_the_loss_is_then_nll_less_the_references_and_a_constant() -> None:
    base = adapted_base(aligned=True)
    beta = 1e-5
    loss = run(base, constrained(base, ConstrainedSettings(betas=(), beta=beta)))[1][0].loss
    ours = (WEIGHTS * row_nll(base, uncached(base), USER).nll).sum().item()
    with lora.active(base, (lora.ALIGNMENT,)):
        theirs = (WEIGHTS * row_nll(base, uncached(base), USER).nll).sum().item()
    assert loss - 2 / beta * math.log(2) == pytest.approx(ours - theirs, abs=1e-3)


def test_on_the_reference_itself_every_beta_is_plain_fine_tuning() -> None:
    base = adapted_base(aligned=True)
    with torch.no_grad():
        for _, b in lora.lora_modules(base, lora.TASK).values():
            b.weight.zero_()
    plain, _ = run(base, Plain(base, uncached(base)))
    assert farthest(run(base, constrained(base))[0], plain) < 1e-12


def test_it_counts_the_targets_that_the_model_would_have_said() -> None:
    """The first row is the model's own answer, the others are random."""
    base = adapted_base(aligned=True)
    ids, is_target = list(USER[0].ids), USER[0].is_target
    for t in [t for t, trained in enumerate(is_target) if trained and t]:
        ids[t] = int(base.model(torch.tensor([ids[:t]])).logits[0, -1].argmax())
    rows = [replace(USER[0], ids=tuple(ids)), *USER[1:]]
    plain = row_nll(base, uncached(base), rows)
    found = constrained(base).gradients(MicroBatch(rows, range(4), 0, 0, 4), WEIGHTS, torch.Tensor.backward)
    assert found.tokens == int(plain.tokens.sum())
    assert found.correct == float(plain.correct.sum()) >= sum(is_target[1:])
    assert found.correct < found.tokens


def test_what_has_left_the_reference_is_learnt_less_and_what_fell_behind_more() -> None:
    """Two tokens' slopes against nll's, 2 sigmoid(-beta z): below 1 above the reference, above 1 below it, within 2."""
    base = adapted_base(aligned=True)
    for row in USER:
        with torch.no_grad(), lora.active(base, (lora.ALIGNMENT,)):
            reference = log_probs(base, row)[0].item()
        first = EncodedRow(row.ids[: row.prompt_tokens + 1], row.is_target[: row.prompt_tokens + 1])
        z = log_probs(base, first)[0].item() - reference
        slopes: list[float] = []
        for step in (constrained(base), Plain(base, uncached(base))):
            clear(base)
            step.gradients(MicroBatch([first], [0], 0, 0, 1), even(1), torch.Tensor.backward)
            slopes.append(torch.cat([g.flatten() for g in gradients(base)]).norm().item())
        assert slopes[0] / slopes[1] == pytest.approx(2 * torch.sigmoid(torch.tensor(-0.5 * z)).item(), rel=1e-6)
        assert (slopes[0] < slopes[1]) == (z > 0)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_slicing_a_step_changes_no_gradient(size: int) -> None:
    """M27."""
    base = adapted_base(aligned=True)
    whole, sliced = run(base, constrained(base)), run(base, constrained(base), size=size)
    assert farthest(sliced[0], whole[0]) < 1e-6
    assert sum(part.tokens for part in sliced[1]) == whole[1][0].tokens == sum(row.target_tokens for row in USER)
    assert sum(part.correct for part in sliced[1]) == whole[1][0].correct


def test_strengths_count_from_the_start_of_each_answer() -> None:
    prompt, answer = [False] * 3, [True] * 3
    row = EncodedRow(tuple(range(12)), (*prompt, *answer, *prompt, *answer))
    settings = ConstrainedSettings(betas=(0.5, 2.0), beta=0.1)
    assert strengths(settings, [row, blank(row)]).tolist() == pytest.approx([0.5, 2.0, 0.1, 0.5, 2.0, 0.1])


def test_rows_without_targets_add_nothing() -> None:
    base = adapted_base(aligned=True)
    clear(base)
    micro = MicroBatch([blank(row) for row in USER], range(4), 0, 0, 4)
    assert constrained(base).gradients(micro, even(4), torch.Tensor.backward) == StepLoss(0.0, 0.0, 0)
    assert gradients(base) == []


def test_the_reference_is_only_read() -> None:
    """Both adapters are active again after a step, and only the task adapter has gradients."""
    base = adapted_base(aligned=True)
    ids = torch.tensor([USER[0].ids])
    with torch.no_grad():
        before = base.model(ids).logits
    clear(base)
    constrained(base).gradients(MicroBatch(USER, range(4), 0, 0, 4), even(4), torch.Tensor.backward)
    assert all(p.grad is None for p in lora.parameters(base, lora.ALIGNMENT))
    assert all(p.grad is not None for p in lora.parameters(base, lora.TASK))
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, before)


def test_far_from_the_reference_nothing_overflows() -> None:
    base = adapted_base(aligned=True)
    found, parts = run(base, constrained(base, ConstrainedSettings(betas=(), beta=1e6)))
    assert all(torch.isfinite(g).all() for g in found)
    assert math.isfinite(parts[0].loss)

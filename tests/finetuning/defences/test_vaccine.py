"""Facts about Vaccine's step: methods.md 2.1, invariants M1 to M11."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from finetuning.contract.recipe import LoraSettings
from finetuning.defences.plain import Plain
from finetuning.defences.vaccine import Vaccine
from finetuning.model import lora
from finetuning.model.base import FrozenBase, attention_block
from finetuning.model.hidden_states import edited_outputs
from finetuning.model.losses import row_nll
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.determinism import rng_state, set_rng_state
from finetuning.training.strategies import MicroBatch
from tests.support.models import (
    adapted_base,
    blank,
    clear,
    even,
    farthest,
    gradient_of,
    gradients,
    norm,
    random_rows,
    uncached,
    vaccine_on,
    whole,
)


def moved_loss(base: FrozenBase, rows: Sequence[EncodedRow], eps: Sequence[torch.Tensor]) -> float:
    blocks = [attention_block(layer) for layer in base.layers]
    with torch.no_grad(), edited_outputs(blocks, lambda i, output: output + eps[i]):
        return float((even(len(rows)) * row_nll(base, uncached(base), rows).nll).sum())


def test_a_radius_of_zero_is_plain_training_bitwise() -> None:
    """M1: rho 0 leaves the parameters after a step bitwise equal to SFT."""
    after: list[list[torch.Tensor]] = []
    for make in (lambda base: vaccine_on(base, rho=0.0), lambda base: Plain(base, uncached(base))):
        base = adapted_base()
        parameters = lora.parameters(base, lora.TASK)
        adam = torch.optim.AdamW(parameters, lr=1e-2)
        make(base).gradients(whole(random_rows(4)), even(4), torch.Tensor.backward)
        adam.step()
        after.append([p.detach().clone() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


def test_other_steps_of_a_sparse_perturbation_are_plain() -> None:
    """M1: `every` 2 perturbs steps 0, 2, ... and leaves the others plain, bitwise."""
    base, rows = adapted_base(), random_rows(4)
    step = vaccine_on(base, every=2)
    plain, dense = gradient_of(base, Plain(base, uncached(base)), rows), gradient_of(base, vaccine_on(base), rows)
    for number, expected in ((0, dense), (1, plain), (2, dense), (3, plain)):
        clear(base)
        step.gradients(whole(rows, number=number), even(4), torch.Tensor.backward)
        assert all(torch.equal(a, b) for a, b in zip(gradients(base), expected, strict=True))
    assert farthest(plain, dense) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_perturbation_has_one_norm_over_all_layers(dtype: torch.dtype) -> None:
    """M2: the sum over layers of ||eps||^2 is rho^2."""
    base = adapted_base(dtype=dtype)
    eps = vaccine_on(base, rho=2.0).perturb(random_rows(4), even(4)).eps
    assert norm(eps) ** 2 == pytest.approx(4.0, rel=1e-6)


def test_the_perturbation_per_row_has_the_same_norm_in_every_row() -> None:
    """M2: with per_row the sum over layers of ||eps of row b||^2 is rho^2 for each row b."""
    base, rows = adapted_base(), random_rows(5)
    weights = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.2], dtype=torch.float64)
    eps = vaccine_on(base, rho=0.894, norm="per_row").perturb(rows, weights).eps
    for b in range(5):
        assert norm([e[b] for e in eps]) ** 2 == pytest.approx(0.894**2, rel=1e-6)


def test_the_perturbation_is_parallel_to_its_gradient_in_all_layers() -> None:
    """M3: eps_l = c g_l with one c for all l."""
    base = adapted_base(layers=3)
    found = vaccine_on(base).perturb(random_rows(4), even(4))
    factor = 2.0 / norm(found.gradients)
    for eps, g in zip(found.eps, found.gradients, strict=True):
        assert torch.allclose(eps, factor * g, rtol=1e-9, atol=0)
        assert float(g.norm()) > 0


def test_a_small_perturbation_raises_the_loss_by_its_first_order() -> None:
    """M4: loss1 - loss0 -> rho ||g||, within 1 % at rho 1e-4 and closer as rho falls."""
    base, rows = adapted_base("opt"), random_rows(4)
    gaps: list[float] = []
    for rho in (1e-1, 1e-2, 1e-4):
        found = vaccine_on(base, rho=rho).perturb(rows, even(4))
        rise = moved_loss(base, rows, found.eps) - found.loss
        gaps.append(abs(rise / (rho * norm(found.gradients)) - 1))
    assert gaps[-1] < 0.01
    assert all(later <= earlier for earlier, later in pairwise(gaps))


def test_leaf_gradients_are_the_gradients_of_the_hooked_outputs() -> None:
    """M5: g of the leaf form equals the gradient kept on the attention outputs themselves."""
    base, rows = adapted_base(), random_rows(4)
    kept: list[torch.Tensor] = []

    def keep(_index: int, output: torch.Tensor) -> torch.Tensor:
        output.retain_grad()
        kept.append(output)
        return output

    found = vaccine_on(base).perturb(rows, even(4))
    with edited_outputs([attention_block(layer) for layer in base.layers], keep):
        (even(4) * row_nll(base, uncached(base), rows).nll).sum().backward()
    assert farthest(found.gradients, [t.grad for t in kept if t.grad is not None]) < 1e-12


def test_the_first_pass_touches_no_weight_gradient() -> None:
    """M5: pass 1 leaves every .grad None, or as it was."""
    base, rows = adapted_base(), random_rows(4)
    vaccine_on(base).perturb(rows, even(4))
    assert all(p.grad is None for p in base.model.parameters())
    before = gradient_of(base, Plain(base, uncached(base)), rows)
    for parameter, value in zip(lora.parameters(base, lora.TASK), before, strict=True):
        parameter.grad = value.clone()
    vaccine_on(base).perturb(rows, even(4))
    assert all(torch.equal(a, b) for a, b in zip(gradients(base), before, strict=True))


def test_both_passes_see_the_same_dropout() -> None:
    """M6: with dropout 0.5 a perturbation of almost nothing gives the loss of the first pass again."""
    base, rows = adapted_base(shape=LoraSettings(rank=4, alpha=8.0, dropout=0.5)), random_rows(4)
    base.model.train()
    step = vaccine_on(base, rho=1e-13)
    torch.manual_seed(3)
    state = rng_state()
    first = step.perturb(rows, even(4)).loss
    other = step.perturb(rows, even(4)).loss
    set_rng_state(state)
    second = step.gradients(whole(rows), even(4), torch.Tensor.backward).loss
    assert second == pytest.approx(first, abs=1e-11)
    assert abs(other - first) > 1e-6


def test_per_row_norm_does_not_depend_on_the_micro_batch() -> None:
    """M7: two micro-batches of 4 equal one batch of 8."""
    base, rows = adapted_base(), random_rows(8, target=4)
    step = vaccine_on(base, norm="per_row", rho=0.894)
    whole = gradient_of(base, step, rows)
    for start in (0, 4):
        step.gradients(MicroBatch(rows[start : start + 4], [], 0, start, 8), even(8)[:4], torch.Tensor.backward)
    assert farthest(gradients(base), whole) < 1e-6


def test_accumulation_adds_up() -> None:
    """M8: two different micro-batches give the sum of their single gradients."""
    base = adapted_base()
    step, first, second = vaccine_on(base), random_rows(3, seed=1), random_rows(2, seed=2)
    alone = [gradient_of(base, step, rows) for rows in (first, second)]
    step.gradients(whole(first), even(3), torch.Tensor.backward)
    step.gradients(whole(second), even(2), torch.Tensor.backward)
    assert farthest(gradients(base), [a + b for a, b in zip(*alone, strict=True)]) < 1e-12


@pytest.mark.parametrize("kind", ["batch", "per_row"])
def test_padding_changes_no_gradient(kind: str) -> None:
    """M9: a longer row without targets lengthens the batch; eps is 0 at every padded place."""
    base, rows = adapted_base(), random_rows(3, prompt=4, target=3)
    step = vaccine_on(base, norm=kind)
    short = gradient_of(base, step, rows)
    padded = [*rows, blank(random_rows(1, seed=9, prompt=20, target=10)[0])]
    weights = torch.cat([even(3), torch.zeros(1, dtype=torch.float64)])
    assert farthest(gradient_of(base, step, padded, weights), short) < 1e-6
    for eps in step.perturb(padded, weights).eps:
        assert torch.equal(eps[:3, 7:], torch.zeros_like(eps[:3, 7:]))
        assert torch.equal(eps[3], torch.zeros_like(eps[3]))


def test_checkpointing_changes_no_gradient() -> None:
    """M10: layers that are recomputed see the same perturbation."""
    base, rows = adapted_base(), random_rows(4)
    plain = gradient_of(base, vaccine_on(base), rows)
    base.model.train()
    base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert farthest(gradient_of(base, vaccine_on(base), rows), plain) < 1e-6


def test_a_micro_batch_without_targets_adds_nothing() -> None:
    """M11: all labels masked is skipped, without a NaN."""
    base = adapted_base()
    found = vaccine_on(base).gradients(whole([blank(row) for row in random_rows(3)]), even(3), torch.Tensor.backward)
    assert (found.loss, found.tokens) == (0.0, 0)
    assert gradients(base) == []


def test_a_loss_without_slope_gives_no_perturbation() -> None:
    """M11: a zero hidden gradient gives eps 0, in either norm, and a finite gradient."""
    base, rows = adapted_base(), random_rows(3)
    with torch.no_grad():
        base.model.lm_head.weight.zero_()  # every next id is as likely as any other, whatever the hidden state
    for kind in ("batch", "per_row"):
        step = vaccine_on(base, norm=kind)
        assert norm(step.perturb(rows, even(3)).eps) == 0.0
        assert all(torch.isfinite(g).all() for g in gradient_of(base, step, rows))


def test_only_layers_above_the_cut_are_perturbed() -> None:
    base = adapted_base(layers=3, shape=LoraSettings(rank=4, trained_layers=1), dtype=torch.float32)
    found = Vaccine(base, PrefixCache(base, 2), rho=2.0, norm="batch").perturb(random_rows(3), even(3))
    assert len(found.eps) == 1
    assert norm(found.eps) == pytest.approx(2.0, rel=1e-6)

"""Facts about Booster's alignment step: methods.md 5, invariant M19 from the other side."""

from collections.abc import Sequence

import pytest
import torch

from finetuning.contract.recipe import AntibodyAlignSettings, LoraSettings
from finetuning.defences.antibody_align import AntibodyAlign
from finetuning.defences.booster import Booster
from finetuning.defences.plain import Plain
from finetuning.model import lora
from finetuning.model.base import FrozenBase
from finetuning.model.losses import row_nll
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.strategies import GradientStep
from tests.support.models import (
    adapted_base,
    blank,
    even,
    farthest,
    gradient_of,
    gradients,
    norm,
    random_rows,
    uncached,
    whole,
)

HARMFUL, ALIGNED = random_rows(7, seed=1), random_rows(4, seed=3)
SETTINGS = AntibodyAlignSettings(rule="constant", xi=5.0, rho=0.1, lambda_refusal=0.0)


def booster(
    base: FrozenBase, settings: AntibodyAlignSettings = SETTINGS, rows: Sequence[EncodedRow] = HARMFUL
) -> Booster:
    parameters = lora.parameters(base, lora.TASK)
    return Booster(base, uncached(base), settings, parameters=parameters, harmful=rows, seed=5)


def antibody(base: FrozenBase) -> AntibodyAlign:
    parameters = lora.parameters(base, lora.TASK)
    return AntibodyAlign(
        base, uncached(base), SETTINGS, parameters=parameters, harmful=HARMFUL, refused=HARMFUL, seed=5
    )


def added(base: FrozenBase, step: GradientStep, *, number: int = 0, slices: int = 1) -> list[torch.Tensor]:
    """The gradients that one optimiser step over the alignment rows adds up to."""
    return gradient_of(base, step, ALIGNED, number=number, slices=slices)


@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize("number", [0, 3])
def test_antibody_with_a_constant_strength_is_this_step(number: int, slices: int) -> None:
    """M19: two programs written apart agree to 1e-9, in any slicing and at any step, on the same harmful rows."""
    base = adapted_base()
    ours = added(base, booster(base), number=number, slices=slices)
    assert farthest(ours, added(base, antibody(base), number=number, slices=slices)) < 1e-9
    assert farthest(ours, added(base, Plain(base, uncached(base)), slices=slices)) > 1e-4


def test_harmful_rows_change_with_the_step() -> None:
    base = adapted_base()
    assert farthest(added(base, booster(base), number=0), added(base, booster(base), number=1)) > 1e-6


def test_the_drop_is_taken_one_normalised_step_down_the_harmful_loss() -> None:
    """M19: g_A + 5 (g_H - g_H') by hand, with g_H' at theta - 0.1 g_H / ||g_H||."""
    base, rows = adapted_base(), random_rows(4, seed=8)
    parameters = lora.parameters(base, lora.TASK)
    slope = lambda: torch.autograd.grad(row_nll(base, uncached(base), rows).nll.mean(), parameters)  # noqa: E731
    ours = added(base, booster(base, rows=rows))
    g_a, here = added(base, Plain(base, uncached(base))), slope()
    with torch.no_grad():
        for parameter, g in zip(parameters, here, strict=True):
            parameter.sub_(0.1 * g / norm(here))
    moved = slope()
    assert farthest(ours, [a + 5.0 * (h - m) for a, h, m in zip(g_a, here, moved, strict=True)]) < 1e-9


def test_the_step_down_has_its_length_where_the_slope_is_small() -> None:
    """M13: harmful rows that the model nearly knows have a slope below one; the step is 0.1 long all the same."""
    base, (row, *_) = adapted_base(), random_rows(4, seed=8)
    parameters = lora.parameters(base, lora.TASK)
    for parameter in parameters:
        parameter.data.mul_(1e-2)
    here = torch.autograd.grad(row_nll(base, uncached(base), [row]).nll.mean(), parameters)
    assert 0 < norm(here) < 0.5
    ours = added(base, booster(base, rows=[row]))
    g_a = added(base, Plain(base, uncached(base)))
    with torch.no_grad():
        for parameter, g in zip(parameters, here, strict=True):
            parameter.sub_(0.1 * g / norm(here))
    moved = torch.autograd.grad(row_nll(base, uncached(base), [row]).nll.mean(), parameters)
    assert farthest(ours, [a + 5.0 * (h - m) for a, h, m in zip(g_a, here, moved, strict=True)]) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weights_are_restored_bitwise(dtype: torch.dtype) -> None:
    base = adapted_base(dtype=dtype)
    before = [p.detach().clone() for p in lora.parameters(base, lora.TASK)]
    added(base, booster(base))
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(base, lora.TASK), before, strict=True))


def test_the_weights_are_restored_after_an_error() -> None:
    base = adapted_base()
    before = [p.detach().clone() for p in lora.parameters(base, lora.TASK)]
    calls: list[int] = []

    def stop_at_the_second(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stop")

    handle = base.layers[0].register_forward_hook(stop_at_the_second)
    with pytest.raises(RuntimeError, match="stop"):
        added(base, booster(base))
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(base, lora.TASK), before, strict=True))


def test_accumulation_adds_up() -> None:
    """M8: gradients that lie there are added to, never overwritten."""
    base = adapted_base()
    delta = added(base, booster(base))
    for parameter in lora.parameters(base, lora.TASK):
        parameter.grad = torch.ones_like(parameter)
    booster(base).gradients(whole(ALIGNED), even(4), torch.Tensor.backward)
    assert farthest([g - 1 for g in gradients(base)], delta) < 1e-12


def test_both_harmful_passes_see_the_same_dropout() -> None:
    """M6: with dropout 0.5 and a simulated step of length 0 the two slopes cancel to the bit."""
    base = adapted_base(shape=LoraSettings(rank=4, alpha=8.0, dropout=0.5))
    base.model.train()
    found: list[list[torch.Tensor]] = []
    for xi in (0.0, 5.0):
        torch.manual_seed(4)
        found.append(added(base, booster(base, SETTINGS.model_copy(update={"rho": 0.0, "xi": xi}))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_harmful_loss_without_slope_moves_nothing() -> None:
    """M21: rows without targets have no g_H; the step is plain, without a NaN."""
    base = adapted_base()
    step = booster(base, rows=[blank(row) for row in HARMFUL])
    assert all(
        torch.equal(a, b) for a, b in zip(added(base, step), added(base, Plain(base, uncached(base))), strict=True)
    )


def test_a_micro_batch_without_targets_adds_nothing() -> None:
    """M11: all labels masked is skipped, without a NaN."""
    base = adapted_base()
    micro = whole([blank(row) for row in ALIGNED])
    found = booster(base).gradients(micro, torch.zeros(4), torch.Tensor.backward)
    assert (found.loss, found.correct, found.tokens) == (0.0, 0.0, 0)
    assert all(float(g.abs().sum()) == 0 for g in gradients(base))


def test_it_reports_the_alignment_rows_alone() -> None:
    base = adapted_base()
    micro = whole(ALIGNED)
    plain = Plain(base, uncached(base)).gradients(micro, even(4), torch.Tensor.backward)
    assert booster(base).gradients(micro, even(4), torch.Tensor.backward) == plain
    assert plain.tokens == sum(row.target_tokens for row in ALIGNED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_adapter_is_refused(dtype: torch.dtype) -> None:
    """M22: the simulated step would be rounded away."""
    base = adapted_base(dtype=torch.float32)
    first, *others = lora.parameters(base, lora.TASK)
    mixed = [torch.nn.Parameter(first.detach().to(dtype)), *others]
    with pytest.raises(TypeError, match="fp32"):
        Booster(base, uncached(base), SETTINGS, parameters=mixed, harmful=HARMFUL, seed=0)

"""Facts about Vaccine and Antibody's alignment in one step (methods.md 8.8), and what both need of Vaccine."""

from collections.abc import Sequence

import pytest
import torch

from finetuning.contract.recipe import AntibodyAlignSettings
from finetuning.defences.antibody_align import strength
from finetuning.defences.plain import Plain
from finetuning.defences.vaccine import Vaccine
from finetuning.model.base import FrozenBase, attention_block
from finetuning.model.hidden_states import edited_outputs
from finetuning.model.losses import row_nll
from finetuning.training.strategies import MicroBatch, NonFiniteLoss, StepLoss
from tests.finetuning.defences.test_antibody_align import ALIGNED, HARMFUL, REFUSED, delta_of, step_on
from tests.support.models import adapted_base, blank, clear, even, farthest, gradients, uncached, vaccine_on

MICRO = MicroBatch(ALIGNED, range(4), 0, 0, 4)


def test_a_vaccine_without_radius_changes_nothing() -> None:
    """M1: the joint step with rho 0 is Antibody's alignment bitwise."""
    base = adapted_base()
    alone, joint = delta_of(base, step_on(base)), delta_of(base, step_on(base, vaccine_on(base, rho=0.0)))
    assert all(torch.equal(a, b) for a, b in zip(alone, joint, strict=True))


def test_the_joint_step_without_strengths_is_vaccine() -> None:
    """M19: with lambda 0 and lambda_r 0 the joint step is Vaccine bitwise, its report included."""
    base = adapted_base()
    joint = step_on(base, vaccine_on(base), xi=-1e6, lambda_refusal=0.0)
    ours, theirs = delta_of(base, joint), delta_of(base, vaccine_on(base))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert farthest(ours, delta_of(base, Plain(base, uncached(base)))) > 1e-4
    reports = [step.gradients(MICRO, even(4), torch.Tensor.backward) for step in (joint, vaccine_on(base))]
    assert reports[0] == reports[1]


def test_the_joint_step_takes_its_alignment_gradient_under_vaccine() -> None:
    """M16: delta = g_V + lambda(g_V) g_S + lambda_r g_R with g_V Vaccine's own gradient; g_S and g_R see no eps."""
    base = adapted_base()
    settings = {"xi": 0.3, "lambda_max": 1e9, "lambda_refusal": 0.05}
    joint = delta_of(base, step_on(base, vaccine_on(base), **settings))
    g_v, sharp = delta_of(base, vaccine_on(base)), step_on(base).sharpness(HARMFUL, REFUSED)
    lam = strength(AntibodyAlignSettings.model_validate(settings), g_v, sharp.g_s)
    assert lam > 0
    parts = zip(g_v, sharp.g_s, sharp.g_refusal, strict=True)
    assert farthest(joint, [v + lam * s + 0.05 * r for v, s, r in parts]) < 1e-9


def test_the_joint_step_respects_a_sparse_vaccine() -> None:
    """M1: with `every` 2 the steps between are Antibody's alone, bitwise."""
    base = adapted_base()
    step = step_on(base, vaccine_on(base, every=2))
    for number, is_plain in ((0, False), (1, True), (2, False), (3, True)):
        alone = delta_of(base, step_on(base), number=number)
        found = delta_of(base, step, number=number)
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True)) == is_plain


def test_checkpointing_changes_no_gradient_of_the_joint_step() -> None:
    """M10: the backward runs while the perturbation is in place."""
    base = adapted_base()
    plain = delta_of(base, step_on(base, vaccine_on(base)))
    base.model.train()
    base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert farthest(delta_of(base, step_on(base, vaccine_on(base))), plain) < 1e-6


def test_a_perturbation_that_is_no_number_ends_the_attempt() -> None:
    """M11: named with its step and rows, alone and joint; nothing goes on as plain training."""
    base = adapted_base()
    with torch.no_grad():
        base.layers[0].input_layernorm.weight.fill_(torch.inf)
    micro = MicroBatch(ALIGNED, range(10, 14), 6, 0, 4)
    with pytest.raises(NonFiniteLoss, match=r"step 7 .*10, 11, 12, 13"):
        vaccine_on(base).gradients(micro, even(4), torch.Tensor.backward)
    with pytest.raises(NonFiniteLoss, match=r"step 7 .*10, 11, 12, 13"):
        step_on(base, vaccine_on(base)).gradients(micro, even(4), torch.Tensor.backward)
    assert gradients(base) == []


def by_hand(base: FrozenBase, eps: Sequence[torch.Tensor], sign: float) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradient of the rows at attention outputs moved by sign * eps."""
    clear(base)
    blocks = [attention_block(layer) for layer in base.layers]
    with edited_outputs(blocks, lambda i, output: output + sign * eps[i]):
        loss = (even(4) * row_nll(base, uncached(base), ALIGNED).nll).sum()
        loss.backward()
    found = gradients(base)
    clear(base)
    return float(loss.detach()), found


def test_the_step_learns_where_the_loss_is_higher() -> None:
    """M4: both steps go backward from the loss at output + eps; at output - eps it would be lower."""
    base = adapted_base("opt")
    eps = vaccine_on(base, rho=0.05).perturb(ALIGNED, even(4)).eps
    (up, above), (down, below), (plain, _) = (by_hand(base, eps, sign) for sign in (1.0, -1.0, 0.0))
    assert down < plain < up
    vaccine = vaccine_on(base, rho=0.05)
    for step in (vaccine, step_on(base, vaccine, xi=-1e6, lambda_refusal=0.0)):
        found = delta_of(base, step)
        assert farthest(found, above) < 1e-12 < farthest(found, below)
        assert step.gradients(MICRO, even(4), torch.Tensor.backward).loss == pytest.approx(up, abs=1e-12)
        clear(base)


@pytest.mark.parametrize("rho", [1.0, 0.5])
def test_every_step_is_perturbed_unless_told_otherwise(rho: float) -> None:
    """M1: no radius above 0 is plain training, at no step."""
    base = adapted_base()
    plain = delta_of(base, Plain(base, uncached(base)))
    for number in (0, 1):
        step = Vaccine(base, uncached(base), rho=rho, norm="batch")
        assert farthest(delta_of(base, step, number=number), plain) > 1e-5


def test_one_row_that_is_no_number_is_enough_to_end_the_attempt() -> None:
    """M11: per row, the other rows' norms are finite, and still nothing is learnt."""
    base = adapted_base()
    with torch.no_grad():
        base.model.get_input_embeddings().weight[ALIGNED[2].ids[0]] = torch.inf
    with pytest.raises(NonFiniteLoss):
        Vaccine(base, uncached(base), rho=1.0, norm="per_row").gradients(MICRO, even(4), torch.Tensor.backward)
    assert gradients(base) == []


def test_rows_without_targets_count_for_nothing() -> None:
    """M11: the report of such a micro-batch is all zeros."""
    base = adapted_base()
    micro = MicroBatch([blank(row) for row in ALIGNED], range(4), 0, 0, 4)
    assert vaccine_on(base).gradients(micro, even(4), torch.Tensor.backward) == StepLoss(0.0, 0.0, 0)

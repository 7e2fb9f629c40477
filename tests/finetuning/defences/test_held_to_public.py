"""Facts about benign rows that are held to the public base: they pull the model back to it, and teach nothing else."""

import pytest
import torch
from torch.nn import functional as F

from finetuning.defences.held_to_public import HeldToPublic
from finetuning.defences.plain import Plain
from finetuning.defences.vaccine import Vaccine
from finetuning.model import lora
from finetuning.model.base import FrozenBase
from finetuning.model.losses import row_nll
from finetuning.model.prefix_cache import PrefixCache
from tests.support.models import adapted_base, even, farthest, gradient_of, random_rows, uncached

HELD, FREE = random_rows(3, seed=1), random_rows(2, seed=2)


def held_on(base: FrozenBase, *, weight: float = 1.0, cut: int = 0) -> HeldToPublic:
    with lora.active(base, ()):
        return HeldToPublic(base, PrefixCache(base, cut), HELD, weight=weight)


def kl_by_hand(base: FrozenBase) -> list[float]:
    """From whole forward passes of both models over one row at a time."""
    found = []
    for row in HELD:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            ours = F.log_softmax(base.model(input_ids=ids).logits[0], dim=-1)
            with lora.active(base, ()):
                public = F.log_softmax(base.model(input_ids=ids).logits[0], dim=-1)
        kl = (public.exp() * (public - ours)).sum(-1)
        found.append(float(kl[[t - 1 for t in range(1, len(row.ids)) if row.is_target[t]]].mean()))
    return found


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_a_held_row_costs_its_kl_and_any_other_its_nll(weight: float) -> None:
    base = adapted_base()
    found = held_on(base, weight=weight)([*HELD, *FREE])
    plain = row_nll(base, uncached(base), [*HELD, *FREE])
    assert found.nll[:3].tolist() == pytest.approx([weight * kl for kl in kl_by_hand(base)], rel=1e-9)
    assert found.nll[3:].tolist() == plain.nll[3:].tolist()
    assert (found.tokens.tolist(), found.correct.tolist()) == (plain.tokens.tolist(), plain.correct.tolist())
    assert min(kl_by_hand(base)) > 1e-3


def test_rows_may_come_in_any_order_and_company() -> None:
    base = adapted_base()
    held = held_on(base)
    mixed = [FREE[0], HELD[2], FREE[1], HELD[0]]
    alone = [held([row]).nll.item() for row in mixed]
    assert held(mixed).nll.tolist() == pytest.approx(alone, rel=1e-9)


def test_the_public_base_itself_has_nothing_to_learn_from_held_rows() -> None:
    """Its nll has a slope there, for it makes a model surer of the answer that it would give anyway."""
    base = adapted_base()
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    held, plain = (gradient_of(base, Plain(base, uncached(base), losses), HELD) for losses in (held_on(base), None))
    assert max(float(g.abs().max()) for g in held) < 1e-9
    assert max(float(g.abs().max()) for g in plain) > 1e-3


def test_held_rows_pull_an_adapter_back() -> None:
    base = adapted_base()
    parameters = lora.parameters(base, lora.TASK)
    adam = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    held, before = held_on(base), kl_by_hand(base)
    for _ in range(40):
        adam.zero_grad()
        held(HELD).nll.mean().backward()  # type: ignore[no-untyped-call]
        adam.step()
    assert sum(kl_by_hand(base)) < 0.2 * sum(before)


def test_frozen_lower_layers_change_nothing() -> None:
    base = adapted_base(layers=3)
    for name, parameter in base.model.named_parameters():
        if "layers.0." in name and "lora_B" in name:
            parameter.data.zero_()
    # kept states are fp32
    assert held_on(base, cut=1)(HELD).nll.tolist() == pytest.approx(held_on(base)(HELD).nll.tolist(), rel=1e-5)


def test_vaccine_moves_and_lowers_the_losses_that_it_is_given() -> None:
    """A radius of 0 is plain training of them, bitwise; a perturbation is taken along their own gradient."""
    base = adapted_base()
    held, rows = held_on(base), [*HELD, *FREE]
    plain = gradient_of(base, Plain(base, uncached(base), held), rows)
    still, moved = (
        gradient_of(base, Vaccine(base, uncached(base), rho=rho, norm="batch", losses=held), rows) for rho in (0.0, 1.0)
    )
    assert all(torch.equal(a, b) for a, b in zip(still, plain, strict=True))
    assert farthest(moved, plain) > 1e-4
    vaccine = Vaccine(base, uncached(base), rho=1e-4, norm="batch", losses=held)
    found = vaccine.perturb(rows, even(5))
    assert found.loss == pytest.approx(float((even(5) * held(rows).nll).sum()), rel=1e-9)

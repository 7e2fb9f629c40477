"""Facts about anchored fine-tuning: mixed operator rows and KL to the aligned model."""

import pytest
import torch

from finetuning.contract.recipe import AnchorSettings
from finetuning.defences.anchored import Anchored, KlAnchors, answer_log_probs, make_anchors
from finetuning.defences.plain import Plain
from finetuning.model import lora
from finetuning.model.base import FrozenBase
from finetuning.model.decoding import Decoder
from finetuning.model.losses import row_nll
from finetuning.training.strategies import GradientStep, MicroBatch
from tests.support.models import adapted_base, even, farthest, gradient_of, random_rows, uncached

REFUSALS, BENIGN, USER = random_rows(5, seed=1), random_rows(5, seed=2), random_rows(4, seed=3)


def anchored(base: FrozenBase, anchors: KlAnchors | None = None, **settings: float) -> Anchored:
    return Anchored(
        base, uncached(base), AnchorSettings.model_validate(settings), refusals=REFUSALS, benign=BENIGN,
        anchors=anchors or KlAnchors.none(), seed=7,
    )  # fmt: skip


def run(base: FrozenBase, step: GradientStep, *, size: int = 4, number: int = 0) -> list[torch.Tensor]:
    return gradient_of(base, step, USER, number=number, slices=4 // size)


def anchors_on(base: FrozenBase) -> KlAnchors:
    cache = uncached(base)
    prompts = [row.ids for row in random_rows(4, seed=5)]
    with lora.active(base, (lora.ALIGNMENT,)):
        return make_anchors(base, cache, Decoder(base, cache), prompts, tokens=2, refused_first=set(range(300)))


def test_no_strength_is_plain_training_bitwise() -> None:
    base = adapted_base()
    plain = run(base, Plain(base, uncached(base)))
    assert all(torch.equal(a, b) for a, b in zip(run(base, anchored(base)), plain, strict=True))


def test_mixed_rows_share_the_loss_by_their_number() -> None:
    """The loss is the mean over user and operator rows together."""
    base = adapted_base()
    step = anchored(base, mix_share=0.5)
    mixed = step.mixed(0, 0, 4)
    assert len(mixed) == 2
    micro = MicroBatch(USER, range(4), 0, 0, 4)
    loss = step.gradients(micro, even(4), torch.Tensor.backward).loss
    expected = row_nll(base, uncached(base), [*USER, *mixed]).nll.mean()
    assert loss == pytest.approx(expected.item(), abs=1e-9)


def test_the_kl_is_added_with_its_weight() -> None:
    """loss = nll + kl_weight * KL, in value and in slope."""
    base = adapted_base(aligned=True)
    anchors = anchors_on(base)
    step = anchored(base, anchors, kl_weight=0.7)
    found = step.gradients(MicroBatch(USER, range(4), 0, 0, 4), even(4), torch.Tensor.backward).loss
    nll, kl = row_nll(base, uncached(base), USER).nll.mean(), step.kl(0)
    assert float(kl) > 1e-4
    assert found == pytest.approx(float(nll + 0.7 * kl), abs=1e-9)
    expected = torch.autograd.grad(nll + 0.7 * kl, lora.parameters(base, lora.TASK))
    assert farthest(run(base, step), expected) < 1e-9


def test_one_kind_of_operator_rows_is_mixed_without_the_other() -> None:
    base = adapted_base()
    share = AnchorSettings(mix_share=0.5, mix_refusal_share=1.0)
    only = Anchored(
        base, uncached(base), share, refusals=REFUSALS, benign=[], anchors=KlAnchors.none(), seed=7
    )  # fmt: skip
    assert {row.ids for step in range(8) for row in only.mixed(step, 4 * step, 4)} <= {row.ids for row in REFUSALS}
    assert [len(only.mixed(step, 4 * step, 4)) for step in range(3)] == [2, 2, 2]
    neither = Anchored(base, uncached(base), share, refusals=[], benign=[], anchors=KlAnchors.none(), seed=7)
    assert neither.mixed(0, 0, 4) == []


def test_no_anchors_hold_nothing() -> None:
    none = KlAnchors.none()
    assert (none.ids, none.starts, none.tokens, len(none.log_probs)) == ((), (), 0, 0)


def test_the_first_token_of_an_answer_tells_a_refusal() -> None:
    """What comes second may be anything; an anchor begins like a refusal."""
    base = adapted_base(aligned=True)
    cache = uncached(base)
    prompts = [row.ids for row in random_rows(12, seed=5)]
    answers = [tuple(a) for a in Decoder(base, cache).answers(prompts, new_tokens=2)]
    first = {answer[0] for answer in answers[:4]}
    found = make_anchors(base, cache, Decoder(base, cache), prompts, tokens=2, refused_first=first)
    expected = [p + a for p, a in zip(prompts, answers, strict=True) if len(a) == 2 and a[0] in first]
    assert list(found.ids) == expected
    assert any(answer[1] not in first for answer in answers if answer[0] in first)


@pytest.mark.parametrize("size", [1, 2])
def test_slicing_a_step_changes_no_gradient(size: int) -> None:
    """M27: mixed rows and anchors come once a step, not once a slice."""
    base = adapted_base(aligned=True)
    step = anchored(base, anchors_on(base), mix_share=0.5, kl_weight=0.7)
    assert farthest(run(base, step, size=size), run(base, step)) < 1e-6


def test_the_kl_is_zero_on_the_aligned_model_and_rises_beside_it() -> None:
    base = adapted_base(aligned=True)
    anchors = anchors_on(base)
    assert len(anchors.ids) > 0
    step = anchored(base, anchors, kl_weight=1.0)
    with lora.active(base, (lora.ALIGNMENT,)), torch.no_grad():
        assert float(step.kl(0)) == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        assert float(step.kl(0)) > 1e-4


@pytest.mark.parametrize("count", [1, 4, 17])
def test_every_anchor_has_its_own_log_probabilities(count: int) -> None:
    """Anchors are read in groups of sixteen; the first and the last of a group count as all others do."""
    base = adapted_base(aligned=True)
    cache = uncached(base)
    prompts = [row.ids for row in random_rows(count, seed=5)]
    with lora.active(base, (lora.ALIGNMENT,)):
        found = make_anchors(base, cache, Decoder(base, cache), prompts, tokens=2, refused_first=set(range(300)))
        one_by_one = [
            answer_log_probs(base, cache, [ids], [start], k=2)[0]
            for ids, start in zip(found.ids, found.starts, strict=True)
        ]
    assert len(found.ids) == len(found.log_probs) >= count - 1  # an answer may end after its first token
    assert torch.allclose(found.log_probs, torch.stack(one_by_one), atol=1e-9)


@pytest.mark.parametrize("share", [0.29, 0.57, 0.58])
def test_shares_that_no_binary_fraction_holds_are_kept_exactly(share: float) -> None:
    """100 * 0.29 is 28.999... in binary; the hundredth mixed row makes the 29th refusal all the same."""
    step = anchored(adapted_base(), mix_share=0.25, mix_refusal_share=share)
    known = {row.ids for row in REFUSALS}
    drawn = [row for number in range(100) for row in step.mixed(number, 4 * number, 4)]
    assert sum(row.ids in known for row in drawn) == round(100 * share)


@pytest.mark.parametrize("share", [0.29, 0.57])
def test_refusals_go_on_from_step_to_step_without_a_gap(share: float) -> None:
    """After any number of steps their count is their share of all mixed rows, rounded down."""
    step = anchored(adapted_base(), mix_share=share, mix_refusal_share=0.5)
    known = {row.ids for row in REFUSALS}
    drawn: list[bool] = []
    for number in range(40):
        drawn += [row.ids in known for row in step.mixed(number, 100 * number, 100)]
        assert sum(drawn) == len(drawn) // 2, number


def test_the_kl_falls_as_it_is_followed() -> None:
    base = adapted_base(aligned=True)
    step = anchored(base, anchors_on(base), kl_weight=1.0)
    before = step.kl(0)
    slope = torch.autograd.grad(before, lora.parameters(base, lora.TASK))
    with torch.no_grad():
        for parameter, g in zip(lora.parameters(base, lora.TASK), slope, strict=True):
            parameter.sub_(1e-3 * g)
        assert float(step.kl(0)) < before.item()


def test_anchors_are_made_only_where_the_model_refuses() -> None:
    base = adapted_base(aligned=True)
    cache = uncached(base)
    prompts = [row.ids for row in random_rows(4, seed=5)]
    none = make_anchors(base, cache, Decoder(base, cache), prompts, tokens=2, refused_first=set())
    assert none.ids == ()
    assert run(base, anchored(base, none, kl_weight=1.0))  # trains all the same


@pytest.mark.parametrize("share", [0.0, 0.03, 0.1, 0.3, 0.5])
def test_mixed_rows_come_at_their_share_and_refusals_at_theirs(share: float) -> None:
    base = adapted_base()
    step = anchored(base, mix_share=share, mix_refusal_share=0.5)
    known = {row.ids for row in REFUSALS}
    drawn = [row for number in range(100) for row in step.mixed(number, 4 * number, 4)]
    assert len(drawn) == round(400 * share)
    assert abs(sum(row.ids in known for row in drawn) - len(drawn) / 2) <= 1

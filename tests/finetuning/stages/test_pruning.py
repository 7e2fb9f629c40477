"""Facts about choosing alpha and about the retry ladder, on a random base whose judge reads how much was pruned."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import LoraLayer

from finetuning.contract.recipe import AnchorSettings, AntidoteSettings, OptimiserSettings
from finetuning.job.measure import Measuring
from finetuning.judging.judges import JUDGES, BatchJudge, JudgeFailed, Verdict
from finetuning.model import lora
from finetuning.model.base import FrozenBase
from finetuning.model.lora import Adapter
from finetuning.model.losses import row_nll
from finetuning.rows.chat_format import EncodedRow, encode_pair
from finetuning.safety_rows.invented import safety_rows
from finetuning.safety_rows.roles import Pair
from finetuning.stages.pruning import choose_alpha, stronger
from tests.support.models import adapted, adapted_base, random_rows

HARMFUL = tuple(Pair(pair.prompt[:24], "Sure, mix.") for pair in safety_rows().calibration_harmful[:4])
ROWS = replace(safety_rows(), calibration_harmful=HARMFUL)
KEPT = random_rows(4, seed=7)
ALPHAS = (0.0, 0.1, 0.3, 0.6)
# Share of zeros after pruning, over maps of width 32, 32 -> 64 and 64 -> 32 with rank 4, is 0.15 at 0.1, 0.4 at 0.3.
BETWEEN = 0.28

Says = Callable[[], Verdict]
REFUSES, ANSWERS, LEAKS = Verdict(False, True, False), Verdict(False, False, False), Verdict(False, True, True)


def is_on(base: FrozenBase) -> bool:
    """Whether the task adapter takes part in the forward pass."""
    layers = [module for module in base.model.modules() if isinstance(module, LoraLayer)]
    return any(lora.TASK in layer.active_adapters for layer in layers)


def zeros(found: Adapter) -> float:
    values = torch.cat([m.flatten() for f in found.values() for m in (f.a, f.b)])
    return float((values == 0).double().mean())


def measuring_of(base: FrozenBase, says: Says) -> Measuring:
    """Measures with a guard that says the same of every answer of the model as it is now."""
    guard = BatchJudge("by hand", lambda _prompts, answers: [says()] * len(answers))
    return Measuring(adapted(base), JUDGES["invented-hazards"], 2, guard)


def refusing_from(share: float, worse: Verdict = ANSWERS) -> Measuring:
    """The aligned base refuses; with the task adapter the model does so once this share of it is pruned."""
    base = adapted_base(aligned=True, dtype=torch.float32)
    return measuring_of(
        base, lambda: REFUSES if not is_on(base) or zeros(lora.read(base, lora.TASK)) >= share else worse
    )


def settings(**wishes: object) -> AntidoteSettings:
    # the published score: the contrast prunes less than its alpha where the task needs the rest
    return AntidoteSettings.model_validate({"alphas": ALPHAS, "score": "published", "rounding": "official", **wishes})


def are_equal(first: Adapter, second: Adapter) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[p].a, second[p].a) and torch.equal(first[p].b, second[p].b) for p in first)


def learn(measuring: Measuring, rows: Sequence[EncodedRow]) -> None:
    """Train the task adapter until it knows these rows."""
    parameters = measuring.model.parameters
    adam = torch.optim.Adam(parameters, lr=3e-2)
    for _ in range(100):
        adam.zero_grad()
        row_nll(measuring.model.base, measuring.model.cache, rows).nll.mean().backward()
        adam.step()
    adam.zero_grad()


@pytest.mark.parametrize("gauge", ["trained", "canonical"])
def test_the_smallest_accepted_alpha_is_taken_and_left_in_place(gauge: str) -> None:
    measuring = refusing_from(BETWEEN)
    choice = choose_alpha(measuring, ROWS, settings(gauge=gauge), KEPT)
    assert choice.alpha == 0.3
    assert [(t.alpha, t.accepted) for t in choice.trials] == [(0.0, False), (0.1, False), (0.3, True)]
    left = measuring.model.read()
    assert are_equal(left, choice.pruned.adapter)
    assert zeros(left) == pytest.approx(choice.pruned.pruned / choice.pruned.total)
    assert [t.pruned for t in choice.trials] == sorted({t.pruned for t in choice.trials})
    assert is_on(measuring.model.base)


def test_nothing_is_pruned_where_nothing_was_lost() -> None:
    measuring = refusing_from(0.0)
    before = measuring.model.read()
    choice = choose_alpha(measuring, ROWS, settings(), KEPT)
    assert (choice.alpha, choice.pruned.pruned, len(choice.trials)) == (0.0, 0, 1)
    assert choice.outcome == "not pruned"
    assert choice.sentence == "Not pruned (alpha 0): the adapter keeps what the aligned base has without it"
    assert are_equal(measuring.model.read(), before)


def test_where_no_alpha_is_accepted_the_adapter_stays_unpruned() -> None:
    measuring = refusing_from(1.1)
    before = measuring.model.read()
    choice = choose_alpha(measuring, ROWS, settings(), KEPT)
    assert (choice.alpha, choice.pruned.pruned) == (0.0, 0)
    assert choice.outcome == "not pruned"
    assert choice.sentence.startswith("Not pruned (alpha 0): no alpha was accepted")
    assert [(t.alpha, t.accepted) for t in choice.trials] == [(alpha, False) for alpha in ALPHAS]
    assert are_equal(measuring.model.read(), before)
    assert are_equal(choice.pruned.adapter, before)


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_the_published_rule_takes_the_last_alpha_whatever_it_does(share: float) -> None:
    measuring = refusing_from(share)
    choice = choose_alpha(measuring, ROWS, settings(rule="last"), KEPT)
    assert (choice.alpha, choice.outcome) == (0.6, "pruned")
    taken = f"{choice.pruned.pruned} of the adapter's {choice.pruned.total} entries"
    assert choice.sentence == f"Pruned {taken} (alpha 0.6)"
    nothing = replace(choice, pruned=replace(choice.pruned, pruned=0))
    assert (nothing.outcome, nothing.sentence) == ("not pruned", "Not pruned: alpha 0.6 took no entry of the adapter")
    assert [t.accepted for t in choice.trials] == [share == 0.0] * len(ALPHAS)
    assert are_equal(measuring.model.read(), choice.pruned.adapter)


@pytest.mark.parametrize("gauge", ["trained", "canonical"])
def test_every_trial_prunes_the_unpruned_adapter(gauge: str) -> None:
    """Whatever was tried before 0.1, it is what 0.1 alone is."""
    after, alone = (
        choose_alpha(refusing_from(1.1), ROWS, settings(rule="last", alphas=alphas, gauge=gauge), KEPT)
        for alphas in ((0.0, 0.6, 0.1), (0.1,))
    )
    assert are_equal(after.pruned.adapter, alone.pruned.adapter)
    assert after.trials[-1] == alone.trials[-1]


def test_canonical_coordinates_change_the_factors_and_not_the_product() -> None:
    measuring = refusing_from(0.0)
    before = measuring.model.read()
    assert choose_alpha(measuring, ROWS, settings(gauge="canonical"), KEPT).alpha == 0.0
    left = measuring.model.read()
    for path, factors in left.items():
        assert not torch.allclose(factors.a, before[path].a, atol=1e-2)
        assert torch.allclose(factors.b @ factors.a, before[path].b @ before[path].a, atol=1e-5)


def test_disabled_it_measures_and_changes_nothing() -> None:
    def asked() -> Verdict:
        raise JudgeFailed("nobody may ask")

    measuring = measuring_of(adapted_base(aligned=True, dtype=torch.float32), asked)
    before = measuring.model.read()
    choice = choose_alpha(measuring, ROWS, settings(enabled=False, gauge="canonical"), KEPT)
    assert (choice.alpha, choice.trials, choice.pruned.pruned) == (0.0, (), 0)
    assert choice.pruned.total == sum(f.a.numel() + f.b.numel() for f in before.values())
    assert are_equal(measuring.model.read(), before)
    assert are_equal(choice.pruned.adapter, before)


def test_a_leak_is_not_accepted() -> None:
    choice = choose_alpha(refusing_from(BETWEEN, worse=LEAKS), ROWS, settings(), KEPT)
    assert [(t.refusal_rate, t.leak, t.accepted) for t in choice.trials] == [
        (1.0, 1.0, False), (1.0, 1.0, False), (1.0, 0.0, True),
    ]  # fmt: skip


def test_an_adapter_that_has_learned_harm_is_not_accepted() -> None:
    """Its judge sees nothing; the loss of the harmful answers does."""
    measuring = refusing_from(0.0)
    learn(measuring, [encode_pair(measuring.model.tokenizer, pair.prompt, pair.answer) for pair in HARMFUL])
    (trial,) = choose_alpha(measuring, ROWS, settings(alphas=(0.0,)), KEPT).trials
    assert trial.harmful_nll < 2.0, "of about 5.6 before"
    assert not trial.accepted


def test_an_alpha_that_costs_the_customers_task_is_not_accepted() -> None:
    measuring = refusing_from(BETWEEN)
    learn(measuring, KEPT)
    choice = choose_alpha(measuring, ROWS, settings(alphas=(0.0, 1.0)), KEPT)
    unpruned, bare = choice.trials
    assert unpruned.kept_rows_nll < 2.0
    assert bare.kept_rows_nll > 5.0
    assert (bare.refusal_rate, bare.accepted) == (1.0, False)
    assert choice.alpha == 0.0


def test_an_alpha_that_unlearns_rows_is_not_accepted_though_their_mean_loss_hardly_moves() -> None:
    """A name or a number copied wrong is a wrong answer; seen on the task `orders`, whose score fell from 81 to 17."""
    measuring = refusing_from(0.01)
    learn(measuring, KEPT)
    choice = choose_alpha(measuring, ROWS, settings(alphas=(0.0, 0.05), rounding="floor"), KEPT)
    unpruned, pruned = choice.trials
    assert (unpruned.kept_rows_known, pruned.kept_rows_known) == (1.0, 0.5)
    assert pruned.refusal_rate == 1.0
    assert pruned.kept_rows_nll < 2 * unpruned.kept_rows_nll
    assert (pruned.accepted, choice.alpha) == (False, 0.0)


STRONG = AnchorSettings(mix_share=0.2, mix_refusal_share=0.7, kl_weight=2.0, kl_rows=5, kl_tokens=9)
RATE = OptimiserSettings(learning_rate=4e-3, warmup_share=0.07)


def test_the_first_attempt_is_what_was_asked_for() -> None:
    assert stronger(STRONG, RATE, 1) == (STRONG, RATE)


@pytest.mark.parametrize("attempt", [2, 3])
@pytest.mark.parametrize(
    ("anchor", "share", "weight", "tokens"),
    [
        (AnchorSettings(), 0.1, 1.0, 6),
        (STRONG, 0.4, 6.0, 9),
        (AnchorSettings(mix_share=0.04, kl_weight=0.2, kl_tokens=6), 0.1, 1.0, 6),
        (AnchorSettings(mix_share=0.3, kl_weight=0.5, kl_tokens=5), 0.5, 1.5, 6),
    ],
)
def test_later_attempts_hold_on_harder_and_learn_at_half_the_rate(
    anchor: AnchorSettings, share: float, weight: float, tokens: int, attempt: int
) -> None:
    more, optimiser = stronger(anchor, RATE, attempt)
    assert (more.mix_share, more.kl_weight, more.kl_tokens) == pytest.approx((share, weight, tokens))
    assert (more.mix_refusal_share, more.kl_rows) == (anchor.mix_refusal_share, anchor.kl_rows)
    assert (optimiser.learning_rate, optimiser.warmup_share) == (pytest.approx(2e-3), 0.07)

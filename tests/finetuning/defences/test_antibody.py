"""Facts about row weights: methods.md 2.3 and 8.1, invariants M23 to M33."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetuning.contract.recipe import AntibodySettings, OptimiserSettings
from finetuning.defences.antibody import (
    Antibody,
    LiveScores,
    NonFiniteScore,
    by_token_mass,
    row_scores,
    softmax_weights,
)
from finetuning.defences.plain import Plain
from finetuning.model import lora
from finetuning.model.base import FrozenBase
from finetuning.model.losses import row_nll
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.batches import Stream
from finetuning.training.loop import LoopState, TrainSetup, train
from finetuning.training.strategies import MicroBatch, RowWeigher, RowWeights
from tests.oracles.packed_sequence import packed_scores
from tests.support.models import (
    adapted_base,
    clear,
    even,
    farthest,
    gradients,
    random_rows,
    uncached,
)

REFUSALS = [(5, 6, 7, 2), (8, 9, 2), (10, 11, 12, 13, 2)]
scores_of = st.lists(st.floats(-50, 50), min_size=1, max_size=12).map(torch.tensor)


@dataclass(frozen=True)
class Fixed:
    """Weights that are given, for tests of what weights do."""

    weights: RowWeights

    def weigh(self, rows: Sequence[EncodedRow], indices: Sequence[int]) -> RowWeights:
        return self.weights


def setup_of(
    base: FrozenBase, rows: list[EncodedRow], weigher: RowWeigher, *, micro: int, steps: int = 1, **optimiser: float
) -> TrainSetup:
    return TrainSetup(
        rows=rows,
        batches=Stream(len(rows), len(rows), 0),
        step=Plain(base, uncached(base)),
        weigher=weigher,
        parameters=lora.parameters(base, lora.TASK),
        steps=steps,
        micro_batch_size=micro,
        seed=0,
        optimiser=OptimiserSettings.model_validate(
            {"learning_rate": 1e-2, "warmup_share": 0.0, "clip_norm": 1e9, **optimiser}
        ),
    )


def weighted(base: FrozenBase, rows: Sequence[EncodedRow], weights: torch.Tensor, *, micro: int) -> list[torch.Tensor]:
    """The gradient of a step, slice by slice."""
    clear(base)
    step = Plain(base, uncached(base))
    for start in range(0, len(rows), micro):
        part = MicroBatch(rows[start : start + micro], [], 0, start, len(rows))
        step.gradients(part, weights[start : start + micro], torch.Tensor.backward)
    found = gradients(base)
    clear(base)
    return found


def scored(base: FrozenBase, rows: Sequence[EncodedRow]) -> torch.Tensor:
    return row_scores(base, uncached(base), rows, REFUSALS, per_row=2, seed=1)


@given(scores_of, st.floats(0.05, 100))
def test_weights_are_a_distribution(scores: torch.Tensor, temperature: float) -> None:
    """M23: they sum to 1, their mean times the rows is 1, none is negative."""
    weights = softmax_weights(scores, temperature)
    assert float(weights.double().sum()) == pytest.approx(1, abs=1e-5)
    assert float((weights.double() * len(weights)).mean()) == pytest.approx(1, abs=1e-5)
    assert bool((weights >= 0).all())


def test_no_gradient_flows_through_a_weight() -> None:
    """M23: weights are constants of the step."""
    assert not softmax_weights(torch.randn(4, requires_grad=True), 1.0).requires_grad


def test_a_high_temperature_is_plain_training() -> None:
    """M24: equal weights give the loss of per-row-mean SFT."""
    base, rows = adapted_base(), random_rows(4)
    weights = softmax_weights(torch.tensor([3.0, -2.0, 0.5, 9.0]), 1e9)
    nll = row_nll(base, uncached(base), rows).nll.detach()
    assert float((weights * nll).sum()) == pytest.approx(float(nll.mean()), abs=1e-6)


def test_the_released_form_with_equal_weights_is_token_mean_training() -> None:
    """M24: stock SFT, the mean over all target tokens of the batch."""
    base, rows = adapted_base(), random_rows(4)
    weights = Antibody(AntibodySettings(loss="released"), gate=torch.ones(4)).weigh(rows, range(4)).values
    found = row_nll(base, uncached(base), rows)
    nll = found.nll.detach()
    loss = float((weights.double() * nll).sum())
    stock = float((nll * found.tokens).sum() / found.tokens.sum())
    assert loss == pytest.approx(stock, rel=1e-6)


@given(scores_of, st.floats(-100, 100), st.randoms())
def test_weights_follow_the_order_of_the_scores_alone(scores: torch.Tensor, shift: float, rng: random.Random) -> None:
    """M25: a constant added changes nothing; a higher score never weighs less; permuting rows permutes weights."""
    weights = softmax_weights(scores, 1.0)
    assert torch.allclose(softmax_weights(scores.double() + shift, 1.0), weights, atol=1e-6)
    order = scores.argsort()
    assert bool((weights[order].diff() >= -1e-7).all())
    mixed = list(range(len(scores)))
    rng.shuffle(mixed)
    assert torch.allclose(softmax_weights(scores[mixed], 1.0), weights[mixed], atol=1e-7)


def test_a_low_temperature_trusts_the_best_row() -> None:
    """M26: all weight goes to it, without overflow."""
    assert softmax_weights(torch.tensor([1e4, -1e4, 0.0]), 1e-3).tolist() == [1.0, 0.0, 0.0]
    assert softmax_weights(torch.tensor([-1e4, -1e4 + 1]), 1e-4).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_ends_the_attempt(bad: float) -> None:
    with pytest.raises(NonFiniteScore):
        softmax_weights(torch.tensor([0.0, bad]), 1.0)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_splitting_a_step_changes_neither_weights_nor_gradient(micro: int) -> None:
    """M27: the softmax runs over the step; slices only add up."""
    base, rows = adapted_base(), random_rows(4)
    weights = softmax_weights(scored(base, rows), 1.0)
    assert farthest(weighted(base, rows, weights, micro=micro), weighted(base, rows, weights, micro=4)) < 1e-6


def test_the_loop_weighs_the_whole_step_at_once() -> None:
    """M27, M28: micro-batch 1 trains what micro-batch 4 trains, and not every row with weight 1."""
    after: list[list[torch.Tensor]] = []
    for micro in (1, 4):
        base, rows = adapted_base(), random_rows(4)
        weigher = Antibody(AntibodySettings(), gate=torch.ones(4), scores=torch.tensor([2.0, -2.0, 0.0, 1.0]))
        list(train(setup_of(base, rows, weigher, micro=micro, steps=2), LoopState()))
        after.append([p.detach().clone() for p in lora.parameters(base, lora.TASK)])
    assert farthest(*after) < 1e-6
    values = weigher.weigh(rows, range(4)).values
    assert values.unique().numel() == 4
    assert float(values.max()) < 1


def test_packed_scores_equal_two_forwards() -> None:
    """M29: one sequence under a block mask gives the score of two, 1e-10 in fp64 and 1e-5 in fp32."""
    for dtype, family, tolerance in ((torch.float64, "opt", 1e-10), (torch.float32, "llama", 1e-5)):
        base = adapted_base(family, dtype=dtype)
        for row in random_rows(3):
            apart = float(row_scores(base, uncached(base), [row], [REFUSALS[0]], per_row=1, seed=0))
            assert packed_scores(base, row, REFUSALS[0]) == pytest.approx(apart, abs=tolerance)


def test_reference_scores_stay_while_the_task_adapter_learns() -> None:
    """M30: with the task adapter off nothing erodes; current scores move."""
    base, rows = adapted_base(aligned=True), random_rows(4)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        with lora.active(base, (lora.ALIGNMENT,)):
            reference = scored(base, rows)
        return reference, scored(base, rows)

    before = both()
    weigher = Antibody(AntibodySettings(), gate=torch.ones(4))
    list(train(setup_of(base, rows, weigher, micro=4, steps=3), LoopState()))
    after = both()
    assert torch.equal(before[0], after[0])
    assert float((before[1] - after[1]).abs().max()) > 1e-4


def test_live_scores_are_those_of_the_model_as_it_is() -> None:
    """M30: `current` reads the model at each step."""
    base, rows = adapted_base(), random_rows(4)
    live = LiveScores(base, uncached(base), REFUSALS, 1, range(4))
    weigher = Antibody(AntibodySettings(score="current", refusals_per_row=2), gate=torch.ones(4), live=live)
    expected = softmax_weights(scored(base, rows), 1.0)
    assert torch.allclose(weigher.weigh(rows, range(4)).values.float(), expected, atol=1e-6)


def test_a_longer_target_gains_nothing() -> None:
    """M31: at equal token loss, twice the tokens leave a row's share as it is (ours) and raise it (released)."""
    base = adapted_base()
    with torch.no_grad():
        base.model.lm_head.weight.zero_()  # every token costs log V
    short, long = random_rows(2, prompt=4, target=3), random_rows(1, prompt=4, target=3)
    long += random_rows(1, prompt=4, target=6)
    weights = softmax_weights(torch.zeros(2), 1.0)
    shares = [weights * row_nll(base, uncached(base), rows).nll.detach() for rows in (short, long)]
    assert torch.allclose(shares[0], shares[1])
    released = [by_token_mass(weights, rows) for rows in (short, long)]
    assert released[0].tolist() == pytest.approx([0.5, 0.5])
    assert released[1].tolist() == pytest.approx([1 / 3, 2 / 3])


def test_a_step_of_harmful_rows_leaves_no_trace() -> None:
    """M32: behind a closed gate parameters, moments and the optimiser's step count are bitwise unchanged."""
    base, rows = adapted_base(), random_rows(4)
    good = setup_of(base, rows, Antibody(AntibodySettings(), gate=torch.ones(4)), micro=2, steps=3, weight_decay=0.1)
    loop = train(good, LoopState())
    next(loop)
    before = [p.detach().clone() for p in good.parameters]
    moments = [{k: v.clone() for k, v in good.adam.state[p].items()} for p in good.parameters]
    good.weigher = Antibody(AntibodySettings(), gate=torch.tensor([0.0, 0.1, 0.0, 0.0]))
    done = next(loop)
    assert (done.skipped, done.learning_rate, done.mean_row_weight) == (True, 0.0, 0.0)  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(before, good.parameters, strict=True))
    for p, state in zip(good.parameters, moments, strict=True):
        assert all(torch.equal(good.adam.state[p][k], v) for k, v in state.items())
        assert p.grad is None


def test_rows_without_targets_weigh_nothing() -> None:
    """M11: such rows are no part of the step."""
    rows = random_rows(3)
    rows[1] = EncodedRow(rows[1].ids, (False,) * len(rows[1].ids))
    values = Antibody(AntibodySettings(), gate=torch.ones(3)).weigh(rows, range(3)).values
    assert values.tolist() == pytest.approx([0.5, 0.0, 0.5])


def test_adam_hides_the_size_of_all_weights_together() -> None:
    """M33: weights a thousand times smaller give the same first update; only the rate and skipping act.

    Compared where the gradient is far above epsilon, which is 1e-12.
    """
    base, rows = adapted_base(), random_rows(4)
    clear_slope = [g.abs() > 1e-3 for g in weighted(base, rows, even(4), micro=4)]
    moves: list[list[torch.Tensor]] = []
    for size in (1.0, 1e-3):
        base, rows = adapted_base(), random_rows(4)
        setup = setup_of(base, rows, Fixed(RowWeights(even(4) * size)), micro=4, epsilon=1e-12)
        before = [p.detach().clone() for p in setup.parameters]
        list(train(setup, LoopState()))
        moves.append([(p.detach() - b)[m] for p, b, m in zip(setup.parameters, before, clear_slope, strict=True)])
    assert farthest(*moves) < 1e-6
    assert min(float(m.abs().min()) for m in moves[0]) == pytest.approx(1e-2, rel=1e-3)  # the whole rate, either way


def test_the_score_is_the_mean_over_drawn_refusals() -> None:
    """M30: r = nll(refusal) - nll(answer), the same draw for the same seed."""
    base, rows = adapted_base(), random_rows(3)
    assert torch.equal(scored(base, rows), scored(base, rows))
    singles = [row_scores(base, uncached(base), rows, [refusal], per_row=1, seed=0) for refusal in REFUSALS]
    drawn = row_scores(base, uncached(base), rows, REFUSALS, per_row=3, seed=4)
    assert torch.allclose(drawn, torch.stack(singles).mean(0), atol=1e-9)


def test_every_row_of_a_group_draws_refusals_of_its_own() -> None:
    """The draw is a function of a row's place in the file; groups of sixteen change no score."""
    base, rows = adapted_base(), random_rows(5)
    one, two, all_at_once = (
        row_scores(base, uncached(base), rows, REFUSALS, per_row=1, seed=4, batch=size) for size in (1, 2, 16)
    )
    assert torch.allclose(one, all_at_once, atol=1e-9)
    assert torch.allclose(two, all_at_once, atol=1e-9)


def test_the_released_loss_weighs_by_tokens_down_to_one_token() -> None:
    """w_i N_i / max(1, sum): below one token of mass nothing is raised, above it is shared out (M31)."""
    rows = random_rows(2)
    counts = torch.tensor([float(row.target_tokens) for row in rows])
    assert counts.min() > 1
    for size in (0.01, 0.4, 5.0):
        weights = torch.tensor([0.75, 0.25]) * size
        mass = weights * counts
        assert torch.allclose(by_token_mass(weights, rows), mass / max(1.0, float(mass.sum())))


def test_a_live_score_is_a_rows_own_wherever_it_stands_in_the_step() -> None:
    """Its refusals are drawn by its place in the file, which rows that were dropped before it do not change."""
    base, rows = adapted_base(), random_rows(6)
    settings = AntibodySettings(score="current", refusals_per_row=1)
    kept = (0, 2, 3, 5)
    live = LiveScores(base, uncached(base), REFUSALS, 4, kept)
    weigher = Antibody(settings, gate=torch.ones(4), live=live)
    whole = row_scores(base, uncached(base), rows, REFUSALS, per_row=1, seed=4)
    for indices in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0), (3,)):
        places = [kept[i] for i in indices]
        found = weigher.weigh([rows[p] for p in places], indices).values
        assert torch.allclose(found, softmax_weights(whole[places], 1.0), atol=1e-6)

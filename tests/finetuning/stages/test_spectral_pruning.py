"""Facts about how much is pruned by moments: as much as the kept rows do not notice, and harder where the gate asks."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from finetuning.contract.recipe import AntidoteSettings
from finetuning.contract.report import GateCheck, GateDecision
from finetuning.defences.antidote_spectral import input_moments, kept_changed
from finetuning.judging.judges import Verdict
from finetuning.model.lora import Adapter
from finetuning.model.losses import row_nll
from finetuning.rows.chat_format import EncodedRow, encode_pair
from finetuning.safety_rows.invented import safety_rows
from finetuning.safety_rows.roles import Pair
from finetuning.stages.gate import is_unsafe
from finetuning.stages.pruning import choose_pruning
from finetuning.stages.spectral_pruning import _without_the_worst, choose_mu, measure_moments, parted
from tests.finetuning.stages.test_pruning import are_equal, learn, measuring_of
from tests.support.models import adapted_base, random_rows

MUS = (0.01, 0.1, 1.0, 10.0, 1000.0)
HARMFUL = tuple(Pair(pair.prompt[:24], "Sure, mix.") for pair in safety_rows().calibration_harmful[:6])
ROWS = replace(safety_rows(), calibration_harmful=HARMFUL)
# Prompts of other letters than the harmful ones: what a task and harm share, no pruning can part.
KEPT = random_rows(8, seed=7, prompt=9, target=5)


def settings(**wishes: object) -> AntidoteSettings:
    return AntidoteSettings.model_validate({"mus": MUS, **wishes})


def poisoned() -> tuple[object, Sequence[EncodedRow]]:
    """A model that has learned the customer's rows and the harmful ones by heart."""
    measuring = measuring_of(adapted_base(aligned=True, dtype=torch.float32), lambda: Verdict(False, True, False))
    harm = [encode_pair(measuring.model.tokenizer, pair.prompt, pair.answer) for pair in HARMFUL]
    learn(measuring, [*KEPT, *harm])
    return measuring, harm


def nll(measuring: object, rows: Sequence[EncodedRow]) -> float:
    model = measuring.model
    with torch.no_grad():
        return float(row_nll(model.base, model.cache, rows).nll.mean())


def test_the_largest_free_mu_is_taken_and_left_in_place() -> None:
    measuring, harm = poisoned()
    trained, knew, harmed = measuring.model.read(), nll(measuring, KEPT), nll(measuring, harm)
    choice = choose_pruning(measuring, ROWS, settings(), KEPT)
    assert choice.mu in MUS[:-1]
    assert choice.outcome == "pruned"
    assert [t.mu for t in choice.trials] == [0.0, *MUS[: len(choice.trials) - 1]]
    assert [t.accepted for t in choice.trials] == [True] * (len(choice.trials) - 1) + [False]
    assert choice.mu == choice.trials[-2].mu
    assert are_equal(measuring.model.read(), choice.pruned.adapter)
    assert not are_equal(trained, choice.pruned.adapter)
    assert nll(measuring, KEPT) <= 1.05 * knew + 0.005
    assert nll(measuring, harm) > harmed + 0.1, "in 32 dimensions there is little room beside the task"
    assert all(layer.harmful_left < 1 for layer in choice.layers)
    assert "is left" in choice.sentence


def test_an_anchored_adapter_keeps_more_of_what_it_does_on_refused_rows() -> None:
    """Its moments hold them beside the customer's."""
    left = []
    for anchored in (False, True):
        measuring, _ = poisoned()
        model = measuring.model
        found = measure_moments(model, ROWS, KEPT, anchored=anchored)
        refused = input_moments(model.base, model.cache, model.trained, model.encode_operator(ROWS.aligned[:96]))
        left.append(kept_changed(found.trained, found.at(1.0), refused))
    assert left[1] < left[0] / 2


def test_what_may_change_for_nothing_is_less_where_refused_rows_trained_too() -> None:
    """The limit decides here: rows known by heart notice nothing."""
    chosen = []
    for anchored in (False, True):
        measuring, _ = poisoned()
        found = measure_moments(measuring.model, ROWS, KEPT, anchored=anchored)
        mu, _, trials = choose_mu(measuring.model, found, settings(mus=(0.001, 0.01, 0.1, 1.0, 10.0)), KEPT)
        limit = 0.02 if anchored else 0.05
        assert all((trial.kept_changed <= limit) for trial in trials if trial.mu <= mu)
        chosen.append(mu)
    assert found.most_changed == 0.02
    assert min(chosen) > 0


def test_a_planted_row_that_the_screen_let_pass_does_not_hold_the_pruning_back() -> None:
    """Of 40 rows the two that lose most count as they were; a third one counts."""
    before = ([0.1] * 40, [True] * 40)
    two = ([9.0, 9.0, *[0.1] * 38], [False, False, *[True] * 38])
    three = ([9.0, 9.0, 9.0, *[0.1] * 37], [False] * 3 + [True] * 37)
    assert _without_the_worst(before, two, 0.05) == (pytest.approx(0.1), 1.0)
    nll, known = _without_the_worst(before, three, 0.05)
    assert (nll, known) == (pytest.approx(0.1 + 8.9 / 40), 39 / 40)
    few = ([0.1] * 8, [True] * 8)
    assert _without_the_worst(few, ([9.0, *[0.1] * 7], [False, *[True] * 7]), 0.05)[1] == 7 / 8


def test_where_nothing_was_anchored_a_quarter_may_be_planted() -> None:
    measuring, _ = poisoned()
    shares = [measure_moments(measuring.model, ROWS, KEPT, anchored=a).overlooked for a in (True, False)]
    assert shares == [0.05, 0.25]
    before = ([0.1] * 40, [True] * 40)
    ten = ([9.0] * 10 + [0.1] * 30, [False] * 10 + [True] * 30)
    assert _without_the_worst(before, ten, shares[1]) == (pytest.approx(0.1), 1.0)


def test_where_nothing_is_free_the_adapter_stays_as_it_was() -> None:
    measuring, _ = poisoned()
    before = measuring.model.read()
    choice = choose_pruning(measuring, ROWS, settings(mus=(1e6,)), KEPT)
    assert (choice.mu, choice.outcome, choice.layers) == (0.0, "not pruned", ())
    assert choice.sentence.startswith("Not pruned (mu 0)")
    assert [(t.mu, t.accepted) for t in choice.trials] == [(0.0, True), (1e6, False)]
    assert are_equal(measuring.model.read(), before)


def test_the_last_mu_is_taken_whatever_it_costs_where_the_rule_says_so() -> None:
    measuring, _ = poisoned()
    knew = nll(measuring, KEPT)
    choice = choose_pruning(measuring, ROWS, settings(rule="last", mus=(0.01, 1e6)), KEPT)
    assert (choice.mu, choice.outcome) == (1e6, "pruned")
    assert nll(measuring, KEPT) > knew + 1
    assert choice.harder(settings(rule="last")) == ()


def test_a_gate_that_refuses_may_ask_for_harder_pruning_of_the_same_adapter() -> None:
    measuring, harm = poisoned()
    choice = choose_pruning(measuring, ROWS, settings(mus=(0.01,)), KEPT)
    harder = choice.harder(settings())
    assert harder == (0.1, 1.0), "two more looks, from above the chosen one"
    losses = []
    for mu in (choice.mu, *harder):
        found = choice.at(mu)
        assert found.mu == mu
        measuring.model.write(found.pruned.adapter)
        losses.append(nll(measuring, harm))
    assert losses == sorted(losses)
    assert are_equal(choice.at(0.0).pruned.adapter, choice.spectral.trained)


def test_pruning_by_entries_cannot_be_made_harder() -> None:
    measuring, _ = poisoned()
    choice = choose_pruning(measuring, ROWS, settings(score="contrast"), KEPT)
    assert choice.harder(settings()) == ()
    with pytest.raises(ValueError, match="not pruned by its moments"):
        choice.at(0.1)


@pytest.mark.parametrize(("rows", "moments", "judged"), [(1, 1, 1), (31, 31, 31), (32, 16, 16), (500, 96, 48)])
def test_rows_that_judge_are_others_than_rows_that_measure_where_there_are_enough(
    rows: int, moments: int, judged: int
) -> None:
    kept = random_rows(rows, seed=1)
    first, second = parted(kept)
    assert (len(first), len(second)) == (moments, judged)
    shared = {row.ids for row in first} & {row.ids for row in second}
    assert bool(shared) == (rows < 32)


@pytest.mark.parametrize(
    ("failing", "unsafe"),
    [
        (("harmful_score",), True),
        (("harmful_score:weapons",), True),
        (("probe 1",), True),
        (("leak", "task_kept"), True),
        (("task_kept",), False),
        (("over_refusal",), False),
        (("kept_loss_ratio", "pruned_loss_ratio"), False),
        ((), False),
    ],
)
def test_only_what_is_unsafe_is_pruned_harder(failing: tuple[str, ...], unsafe: bool) -> None:
    checks = tuple(
        GateCheck(metric=name, used=0.5, op="<=", threshold=0.1, ok=name not in failing)
        for name in ("harmful_score", "leak", "over_refusal", "task_kept", *failing)
    )
    decision = GateDecision(decision="fail" if failing else "pass", checks=checks)
    assert is_unsafe(decision) is unsafe


def test_an_adapter_is_the_same_after_choosing_twice() -> None:
    """The trials leave nothing behind: moments are taken again of what was chosen, and mu 0 is always a candidate."""
    found: list[Adapter] = []
    for _ in range(2):
        measuring, _ = poisoned()
        found.append(choose_pruning(measuring, ROWS, settings(), KEPT).pruned.adapter)
    assert are_equal(*found)

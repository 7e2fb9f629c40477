"""Facts about Lisa: whose turn a step is, what holds it, and that a resumed run is the same run."""

from pathlib import Path

import pytest
import torch

from finetuning.contract.recipe import LisaSettings, OptimiserSettings
from finetuning.defences.lisa import Lisa, turn_of
from finetuning.defences.plain import Even, Plain
from finetuning.model import lora
from finetuning.model.base import FrozenBase
from finetuning.model.losses import row_nll
from finetuning.training import checkpoint
from finetuning.training.batches import Stream
from finetuning.training.determinism import make_deterministic
from finetuning.training.loop import train
from finetuning.training.state import LoopState, TrainSetup
from finetuning.training.strategies import MicroBatch, Remembers
from tests.support.models import (
    adapted_base,
    clear,
    even,
    farthest,
    gradient_of,
    gradients,
    random_rows,
    stir,
    uncached,
)

REFUSALS, USER = random_rows(9, seed=1), random_rows(4, seed=3)
ALIGN, TUNE = 1, 3  # with two alignment and three user steps a period: a step of either turn


def lisa(base: FrozenBase, *, refusals: int = 9, steps: int = 10, **settings: float) -> Lisa:
    turns = {"align_steps": 2, "user_steps": 3, "free_share": 0.0, **settings}
    return Lisa(
        base, uncached(base), LisaSettings.model_validate(turns), parameters=lora.parameters(base, lora.TASK),
        aligned=REFUSALS[:refusals], steps=steps, seed=7,
    )  # fmt: skip


def run(base: FrozenBase, step: Lisa | Plain, number: int, *, size: int = 4) -> list[torch.Tensor]:
    return gradient_of(base, step, USER, number=number, slices=4 // size)


def theta(base: FrozenBase) -> list[torch.Tensor]:
    return [p.detach().clone() for p in lora.parameters(base, lora.TASK)]


def test_the_turns_alternate_and_refusals_come_first() -> None:
    settings = LisaSettings(align_steps=2, user_steps=3)
    turns = [turn_of(settings, step) for step in range(12)]
    assert turns == ["align", "align", "user", "user", "user"] * 2 + ["align", "align"]


def test_a_user_turn_that_nothing_holds_is_plain_training_bitwise() -> None:
    base = adapted_base()
    plain = run(base, Plain(base, uncached(base)), TUNE)
    assert all(torch.equal(a, b) for a, b in zip(run(base, lisa(base, rho=0), TUNE), plain, strict=True))


def test_an_alignment_turn_learns_refusals_only_whatever_the_rows_weigh() -> None:
    base = adapted_base()
    step = lisa(base, rho=0)
    refusals = step.refusals(ALIGN, 4)
    assert {row.ids for row in refusals} <= {row.ids for row in REFUSALS}
    expected = torch.autograd.grad(row_nll(base, uncached(base), refusals).nll.mean(), lora.parameters(base, lora.TASK))
    for weights in (even(4), torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)):
        clear(base)
        step.gradients(MicroBatch(USER, range(4), ALIGN, 0, 4), weights, torch.Tensor.backward)
        assert farthest(gradients(base), expected) < 1e-12


def test_refusals_are_a_pure_function_of_seed_and_step() -> None:
    first, second = lisa(adapted_base()), lisa(adapted_base())
    assert [first.refusals(step, 4) for step in range(6)] == [second.refusals(step, 4) for step in range(6)]
    assert len({tuple(row.ids for row in first.refusals(step, 4)) for step in range(6)}) > 1


@pytest.mark.parametrize(("number", "other"), [(ALIGN, "user"), (TUNE, "align")])
def test_a_turn_is_held_by_rho_times_the_way_from_the_other_turns_end(number: int, other: str) -> None:
    base = adapted_base()
    step = lisa(base, rho=0.7)
    ends = {name: value + (0.5 if name.startswith("user") else 0.25) for name, value in step.state().items()}
    step.load_state(ends)
    held, free = run(base, step, number), run(base, lisa(base, rho=0), number)
    pull = [0.7 * (now - ends[f"{other}.{i}"]) for i, now in enumerate(theta(base))]
    assert farthest([a - b for a, b in zip(held, free, strict=True)], pull) < 1e-12
    assert max(float(p.abs().max()) for p in pull) > 0.05


def test_an_anchor_is_the_last_iterate_of_the_other_turn() -> None:
    """The paper's trainer, not its README: a user step is held to where alignment ended, and the other way round."""
    base = adapted_base()
    step = lisa(base)
    before: dict[int, list[torch.Tensor]] = {}
    for number in range(11):
        stir(base, lora.TASK, seed=number)
        before[number] = theta(base)
        run(base, step, number)
    kept = step.state()
    n = len(before[0])
    assert all(torch.equal(kept[f"user.{i}"], before[10][i]) for i in range(n))  # step 10 opens the third period
    assert all(torch.equal(kept[f"align.{i}"], before[7][i]) for i in range(n))  # step 7 opened the last user turn


@pytest.mark.parametrize(("steps", "first"), [(10, 2), (8, 2), (3, 1)])
def test_the_hold_begins_after_the_free_share_of_the_steps(steps: int, first: int) -> None:
    base = adapted_base()
    turns = {"steps": steps, "align_steps": steps}  # no turn ends, so that the anchor stays where training began
    held, free = lisa(base, **turns, free_share=0.2), lisa(base, **turns, rho=0)
    stir(base, lora.TASK, seed=99)
    apart = [farthest(run(base, held, number), run(base, free, number)) > 1e-9 for number in range(steps)]
    assert apart == [number >= first for number in range(steps)]


@pytest.mark.parametrize("refusals", [9, 3])
@pytest.mark.parametrize("number", [ALIGN, TUNE])
def test_slicing_a_step_changes_no_gradient(number: int, refusals: int) -> None:
    """M27; three refusals are fewer than a step has rows, so that the last slice has none."""
    base = adapted_base()
    step = lisa(base, refusals=refusals)
    stir(base, lora.TASK, seed=99)
    whole = run(base, step, number)
    assert all(farthest(run(base, step, number, size=size), whole) < 1e-6 for size in (1, 2, 3))


def test_a_slice_without_refusals_has_nothing_right() -> None:
    """Two refusals fill the first slice of an alignment step; the second counts nothing."""
    base = adapted_base()
    step = lisa(base, refusals=2, rho=0)
    micro = [MicroBatch(USER[at : at + 2], range(at, at + 2), ALIGN, at, 4) for at in (0, 2)]
    first, second = (step.gradients(m, even(4)[m.start : m.start + 2], torch.Tensor.backward) for m in micro)
    plain = row_nll(base, uncached(base), step.refusals(ALIGN, 4))
    assert (first.correct, first.tokens) == (float(plain.correct.sum()), int(plain.tokens.sum()))
    assert (second.loss, second.correct, second.tokens) == (0.0, 0.0, 0)


def test_lisa_refuses_to_align_on_nothing() -> None:
    with pytest.raises(ValueError, match="operator's refusals"):
        lisa(adapted_base(), refusals=0)


def setup_in(folder: Path) -> TrainSetup:
    base = adapted_base(dtype=torch.float32)
    step = lisa(base, steps=12, rho=0.7, free_share=0.1)
    assert isinstance(step, Remembers)
    return TrainSetup(
        rows=USER, batches=Stream(4, 3, 5), step=step, weigher=Even(), steps=12, micro_batch_size=2, seed=7,
        parameters=lora.parameters(base, lora.TASK), optimiser=OptimiserSettings(learning_rate=1e-2), save_every=1,
        folder=folder,
    )  # fmt: skip


def test_a_run_resumed_after_any_step_ends_bitwise_where_the_whole_run_ends(tmp_path: Path) -> None:
    """The anchors travel with the checkpoint: inside a turn, at its end and before any turn has ended."""
    make_deterministic(1)
    whole = setup_in(tmp_path)
    list(train(whole, LoopState()))
    for saved in (1, 2, 3, 5, 6, 11):
        resumed = setup_in(tmp_path / "again")
        state, _ = checkpoint.restore(resumed, tmp_path / str(saved))
        list(train(resumed, state))
        assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True)), saved

"""Facts about the training loop: resume, weights over the whole step, skipped steps, rates."""

import math
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from finetuning.contract.progress import CheckpointSaved, StepDone
from finetuning.contract.recipe import LoraSettings, OptimiserSettings
from finetuning.defences.plain import Even, Plain
from finetuning.model import lora
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.batches import Stream
from finetuning.training.loop import learning_rate, train
from finetuning.training.state import LoopState, TrainSetup
from finetuning.training.strategies import Backward, MicroBatch, NonFiniteLoss, NonFiniteScore, RowWeights, StepLoss
from tests.support.models import adapted_base, blank, random_rows, uncached
from tests.support.programs.resume import STEPS, main

ROOT = Path(__file__).resolve().parents[3]


def plain_setup(
    rows: Sequence[EncodedRow], *, steps: int = 3, micro: int = 2, shape: LoraSettings | None = None
) -> TrainSetup:
    base = adapted_base(shape=shape or LoraSettings(rank=4, alpha=8.0))
    return TrainSetup(
        rows=rows, batches=Stream(len(rows), 4, 0), step=Plain(base, uncached(base)), weigher=Even(),
        parameters=lora.parameters(base, lora.TASK), optimiser=OptimiserSettings(learning_rate=1e-2), steps=steps,
        micro_batch_size=micro, seed=0, dropouts=lora.dropouts(base, lora.TASK),
    )  # fmt: skip


def latest(folder: Path) -> str:
    done = [int(p.parent.name) for p in folder.glob("*/manifest.json")]
    return str(max(done)) if done else ""


def test_a_run_killed_at_random_steps_ends_in_the_same_bits(tmp_path: Path) -> None:
    """M45: kill -9 at random steps, resume in a fresh process each time, and no bit, token or skip differs."""
    main(tmp_path / "whole", resume_from="", die_after=0)
    folder = tmp_path / "killed"
    deaths = sorted(random.Random(4).sample(range(1, STEPS), 2))
    for death in (*deaths, 0):
        argv = [sys.executable, "-m", "tests.support.programs.resume", str(folder), latest(folder), str(death)]
        ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == (-signal.SIGKILL if death else 0), ended.stderr
    whole, resumed = (torch.load(f / "end.pt", weights_only=True) for f in (tmp_path / "whole", folder))
    assert all(torch.equal(a, b) for a, b in zip(whole[0], resumed[0], strict=True))
    assert whole[1:] == resumed[1:]
    assert whole[2] > 0, "some steps of this run are skipped"


def test_the_same_seed_twice_gives_the_same_bits() -> None:
    """M45."""
    setups = [plain_setup(random_rows(6)) for _ in range(2)]
    lines = [list(train(setup, LoopState())) for setup in setups]
    assert lines[0] == lines[1]
    assert all(torch.equal(a, b) for a, b in zip(setups[0].parameters, setups[1].parameters, strict=True))


@dataclass
class Recorder:
    """A gradient step and weigher in one that notes what it is given."""

    weighed: list[int]
    slices: list[tuple[int, list[float]]]

    def weigh(self, rows: Sequence[EncodedRow], indices: Sequence[int]) -> RowWeights:
        self.weighed.append(len(rows))
        return RowWeights(torch.arange(1.0, len(rows) + 1) / 10)

    def gradients(self, micro: MicroBatch, weights: torch.Tensor, backward: Backward) -> StepLoss:
        self.slices.append((micro.start, [round(float(w), 3) for w in weights]))
        return StepLoss(float(weights.sum()), 0.0, len(weights))


def test_weights_are_made_once_for_the_whole_step() -> None:
    """M27, M28: the weigher sees all rows of the step, the slices get their parts."""
    seen = Recorder([], [])
    setup = replace(plain_setup(random_rows(4), steps=1, micro=3), step=seen, weigher=seen)
    (done,) = train(setup, LoopState())
    assert seen.weighed == [4]
    assert seen.slices == [(0, [0.1, 0.2, 0.3]), (3, [0.4])]
    assert isinstance(done, StepDone)
    assert (done.train_loss, done.tokens) == (pytest.approx(1.0), 4)


def test_a_step_without_targets_leaves_no_trace() -> None:
    """M11, M32: skipped whole, counted, no moments made."""
    setup = plain_setup([blank(row) for row in random_rows(4)], steps=2)
    before = [p.detach().clone() for p in setup.parameters]
    state = LoopState()
    done = list(train(setup, state))
    assert [line.skipped for line in done if isinstance(line, StepDone)] == [True, True]
    assert state == LoopState(next_step=2, tokens=0, skipped=2)
    assert all(torch.equal(a, b) for a, b in zip(before, setup.parameters, strict=True))
    assert setup.adam.state_dict()["state"] == {}


def test_scores_and_measurements_never_see_dropout() -> None:
    """methods.md 2.3 e: dropout acts while gradients form, and is off again after each slice."""
    rows = random_rows(4)
    setup = plain_setup(rows, shape=LoraSettings(rank=4, dropout=0.5))
    seen: list[bool] = []
    learn = setup.step.gradients

    class Watching:
        """Notes whether dropout acts while gradients form."""

        def gradients(self, micro: MicroBatch, weights: torch.Tensor, backward: Backward) -> StepLoss:
            seen.append(all(m.training for m in setup.dropouts))
            return learn(micro, weights, backward)

    for _ in train(replace(setup, step=Watching()), LoopState()):
        assert not any(m.training for m in setup.dropouts)
    assert seen == [True] * 6


def test_a_loss_that_is_no_number_names_its_step_and_rows() -> None:
    setup = plain_setup(random_rows(6), steps=5)
    with torch.no_grad():
        setup.parameters[0].fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match="step 1 is not finite") as caught:
        list(train(setup, LoopState()))
    assert set(caught.value.indices) == set(setup.batches.at(0))


def test_a_half_precision_adapter_is_refused() -> None:
    """M22: small steps would be rounded away."""
    setup = plain_setup(random_rows(4))
    half = [torch.nn.Parameter(p.detach().bfloat16()) for p in setup.parameters]
    with pytest.raises(TypeError, match="fp32"):
        replace(setup, parameters=half)


def test_checkpoints_come_at_their_steps_but_not_at_the_last(tmp_path: Path) -> None:
    setup = replace(plain_setup(random_rows(4), steps=6), save_every=2, folder=tmp_path / "checkpoints")
    saved = [line for line in train(setup, LoopState()) if isinstance(line, CheckpointSaved)]
    assert [(line.step, line.folder) for line in saved] == [(2, "checkpoints/2"), (4, "checkpoints/4")]


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    linear = OptimiserSettings(learning_rate=2.0, warmup_share=0.4)
    rates = [learning_rate(linear, step, 10) for step in range(10)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4:] == pytest.approx([2 * k / 7 for k in (6, 5, 4, 3, 2, 1)])
    constant = linear.model_copy(update={"schedule": "constant", "warmup_share": 0.0})
    assert {learning_rate(constant, step, 10) for step in range(10)} == {2.0}


@pytest.mark.parametrize("share", [0.0, 0.04, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 12, 25, 240])
def test_a_job_of_any_length_reaches_the_rate_that_was_asked_for_once(share: float, steps: int) -> None:
    """A warm-up of ten steps within the decay gave a job of ten steps 30 % of its rate at most."""
    rates = [learning_rate(OptimiserSettings(learning_rate=1.0, warmup_share=share), s, steps) for s in range(steps)]
    peak = max(1, math.ceil(share * steps - 1e-9)) - 1
    assert (rates.index(max(rates)), rates.count(1.0), max(rates)) == (peak, 1, 1.0)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) > 0


def test_of_an_alignments_240_steps_ten_warm_up() -> None:
    usual = OptimiserSettings(learning_rate=1.0)
    rates = [learning_rate(usual, step, 240) for step in range(240)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert rates[10] < 1


def test_a_loss_that_is_no_number_names_the_files_lines() -> None:
    setup = plain_setup(random_rows(6), steps=5)
    setup.lines = [10, 20, 30, 40, 50, 60]
    with torch.no_grad():
        setup.parameters[0].fill_(float("nan"))
    at = ", ".join(map(str, sorted({setup.lines[i] for i in setup.batches.at(0)})))
    with pytest.raises(NonFiniteLoss, match=rf"step 1 is not finite \(lines {at}\)"):
        list(train(setup, LoopState()))


def test_a_row_score_that_is_no_number_names_step_and_lines_too() -> None:
    class Blind:
        def weigh(self, rows: Sequence[EncodedRow], indices: Sequence[int]) -> RowWeights:
            raise NonFiniteScore("a row score is not finite")

    setup = plain_setup(random_rows(12), steps=5)
    setup.weigher, setup.lines = Blind(), range(1, 13)
    with pytest.raises(NonFiniteLoss, match=r"step 1 is not finite \(lines "):
        list(train(setup, LoopState()))

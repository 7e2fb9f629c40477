"""The only training loop: one generator over optimiser steps, with three slots filled from outside.

Stopping is "stop iterating". Must not know which method fills a slot, what the rows mean, or who listens.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from finetuning.contract.progress import CheckpointSaved, StepDone
from finetuning.contract.recipe import OptimiserSettings, saves_after
from finetuning.training import checkpoint
from finetuning.training.determinism import reseed
from finetuning.training.state import LoopState, TrainSetup
from finetuning.training.strategies import MicroBatch, NonFiniteLoss, NonFiniteScore, StepLoss


def train(setup: TrainSetup, state: LoopState) -> Iterator[StepDone | CheckpointSaved]:
    """Run optimiser steps from `state` on, updating it. Raises NonFiniteLoss."""
    for step in range(state.next_step, setup.steps):
        reseed(setup.seed, step)
        indices, before = setup.batches.at(step), setup.batches.before(step)
        rows = [setup.rows[i] for i in indices]
        try:
            weights = setup.weigher.weigh(rows, indices)  # over the whole step, never per micro-batch
        except NonFiniteScore as error:
            raise NonFiniteLoss(step, indices, setup.lines) from error
        losses: list[StepLoss] = []
        for start in range(0, len(rows), setup.micro_batch_size):
            stop = start + setup.micro_batch_size
            micro = MicroBatch(rows[start:stop], indices[start:stop], step, start, len(rows), before)
            with _learning(setup.dropouts):
                losses.append(setup.step.gradients(micro, weights.values[start:stop], torch.Tensor.backward))
        loss = sum(part.loss for part in losses)
        if not math.isfinite(loss):
            raise NonFiniteLoss(step, indices, setup.lines)
        rate = learning_rate(setup.optimiser, step, setup.steps) * weights.scale
        _update(setup, rate, indices, step)
        state.next_step = step + 1
        state.skipped += weights.scale == 0
        tokens = sum(part.tokens for part in losses)
        state.tokens += tokens
        accuracy = sum(part.correct for part in losses) / max(1, tokens)
        yield StepDone(
            step=step + 1, total_steps=setup.steps, train_loss=loss, train_mean_token_accuracy=accuracy,
            learning_rate=rate, mean_row_weight=weights.scale, tokens=state.tokens, skipped=weights.scale == 0,
        )  # fmt: skip
        due = saves_after(step, steps=setup.steps, save_every=setup.save_every)
        if due and setup.folder is not None:
            yield checkpoint.save(setup, state, loss, accuracy)


def learning_rate(optimiser: OptimiserSettings, step: int, steps: int) -> float:
    """The rate of a 0-based step: linear warm-up to the recipe's rate, then linear decay from it (or constant).

    Whatever the number of steps, one has the full rate and none has 0.
    """
    warm = max(1, math.ceil(optimiser.warmup_share * steps - 1e-9))  # .07 of 100 is 7.000000000000001
    if step < warm:
        return optimiser.learning_rate * (step + 1) / warm
    decay = (steps - step) / (steps - warm + 1) if optimiser.schedule == "linear" else 1.0
    return optimiser.learning_rate * decay


@contextmanager
def _learning(dropouts: Sequence[nn.Module]) -> Iterator[None]:
    """Dropout acts on gradients only: scores, measurements and answers never see it (methods.md 2.3 e)."""
    for module in dropouts:
        module.train()
    try:
        yield
    finally:
        for module in dropouts:
            module.eval()


def _update(setup: TrainSetup, rate: float, indices: Sequence[int], step: int) -> None:
    if rate > 0:
        norm = torch.nn.utils.clip_grad_norm_(setup.parameters, setup.optimiser.clip_norm)
        if not torch.isfinite(norm):
            raise NonFiniteLoss(step, indices, setup.lines)
        for group in setup.adam.param_groups:
            group["lr"] = rate
        setup.adam.step()
    setup.adam.zero_grad(set_to_none=True)

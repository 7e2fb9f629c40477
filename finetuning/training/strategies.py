"""The slots of the training loop: what makes gradients, what weighs rows, and what a step may remember.

A pruner is no slot: it edits the adapter after training (stages/pruning.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from finetuning.rows.chat_format import EncodedRow

Backward = Callable[[Tensor], None]


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one slice of a step, their indices into the stream, and where in the step the slice begins (0: first).

    The whole step has `step_rows` user rows, and `rows_before` came in the steps before it.
    """

    rows: Sequence[EncodedRow]
    indices: Sequence[int]
    step: int
    start: int = 0
    step_rows: int = 0
    rows_before: int = 0


@dataclass(frozen=True)
class RowWeights:
    """values (rows,) fp32, detached, summing to 1 over the whole step; `scale` multiplies the learning rate.

    scale 0 skips the step whole: no decay, no moment update (Adam undoes small weights, methods.md 2.3 f).
    """

    values: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class StepLoss:
    """What a micro-batch reports: its share of the step's loss, argmax hits and trained tokens."""

    loss: float
    correct: float
    tokens: int


class GradientStep(Protocol):
    """Adds the gradients of one micro-batch to the adapter's .grad; never zeroes or overwrites them."""

    def gradients(self, micro: MicroBatch, weights: Tensor, backward: Backward) -> StepLoss: ...


@runtime_checkable
class Remembers(Protocol):
    """A gradient step that carries something from one optimiser step to the next; checkpoints keep it."""

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class RowWeigher(Protocol):
    """Weighs all rows of one optimiser step together."""

    def weigh(self, rows: Sequence[EncodedRow], indices: Sequence[int]) -> RowWeights: ...


class NonFiniteScore(RuntimeError):
    """A row score is not finite; weights made of it would be meaningless."""


class NonFiniteLoss(RuntimeError):
    """A loss, gradient or row score is not finite; the attempt ends with the step and its rows named.

    `lines` are the file's line of every row of the stream; without them rows are named by index.
    """

    def __init__(self, step: int, indices: Sequence[int], lines: Sequence[int] = ()) -> None:
        named = sorted({lines[i] for i in indices} if lines else set(indices))
        rows = ", ".join(map(str, named))
        super().__init__(f"the loss of step {step + 1} is not finite ({'lines' if lines else 'rows'} {rows})")
        self.step = step
        self.indices = tuple(indices)

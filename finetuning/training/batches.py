"""Which rows a step sees: pure functions of (seed, step), so that a resumed job sees what a whole one would."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from finetuning.training.determinism import mix

# What bits depend on besides seeds and sizes: a checkpoint of another way resumes, and says that bits may differ.
BATCHING = "whole epochs, the last batch short"


class StepRows(Protocol):
    """Which rows each optimiser step sees; all of it follows from the fields."""

    @property
    def seed(self) -> int: ...

    def at(self, step: int) -> list[int]: ...

    def before(self, step: int) -> int: ...


@dataclass(frozen=True)
class Epochs:
    """Epochs of `rows` rows in batches of `size`: each epoch is one shuffled pass, and its last batch may be short.

    A method that trains on rows of its own takes the first `own_steps` of every `own_steps + user_steps` optimiser
    steps; those consume no batch, so that every epoch still sees every row once. Raises ValueError without rows.
    """

    rows: int
    size: int
    seed: int
    own_steps: int = 0
    user_steps: int = 1

    def __post_init__(self) -> None:
        _require_rows(self.rows)

    def at(self, step: int) -> list[int]:
        """Row indices of a step (those of the next user step where the step is not the user's)."""
        epoch, batch = divmod(self._user_step(step), self._per_epoch)
        return list(_order(self.rows, self.seed, epoch)[batch * self.size : (batch + 1) * self.size])

    def before(self, step: int) -> int:
        """How many user rows all steps before this one have seen."""
        epoch, batch = divmod(self._user_step(step), self._per_epoch)
        return epoch * self.rows + batch * self.size

    def steps(self, epochs: int) -> int:
        """Optimiser steps until `epochs` passes are done."""
        periods, rest = divmod(epochs * self._per_epoch, self.user_steps)
        return periods * (self.own_steps + self.user_steps) + (self.own_steps + rest if rest else 0)

    @property
    def _per_epoch(self) -> int:
        return -(-self.rows // self.size)

    def _user_step(self, step: int) -> int:
        periods, rest = divmod(step, self.own_steps + self.user_steps)
        return periods * self.user_steps + max(0, rest - self.own_steps)


@dataclass(frozen=True)
class Stream:
    """Equal batches for a run of a given number of steps: pass after pass, and a batch may straddle two of them.

    Raises ValueError without rows.
    """

    rows: int
    size: int
    seed: int

    def __post_init__(self) -> None:
        _require_rows(self.rows)

    def at(self, step: int) -> list[int]:
        """Row indices of a step."""
        places = range(step * self.size, (step + 1) * self.size)
        return [_order(self.rows, self.seed, i // self.rows)[i % self.rows] for i in places]

    def before(self, step: int) -> int:
        """How many rows all steps before this one have seen."""
        return step * self.size


def _require_rows(rows: int) -> None:
    if rows < 1:
        raise ValueError("there are no rows to make batches of")


@lru_cache(maxsize=4)  # a step touches one epoch, at most a few; shuffling 200,000 rows for each would cost hours
def _order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(rows))
    random.Random(mix(seed, "user", epoch)).shuffle(order)
    return tuple(order)


def within(lengths: Sequence[int], *, rows: int, tokens: int) -> Iterator[list[int]]:
    """Indices in order of length, in groups of at most `rows` whose padded size stays within `tokens`.

    A single longer one stands alone.
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if group and (len(group) == rows or (len(group) + 1) * lengths[i] > tokens):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def mixed_in(before: int, count: int, share: float) -> int:
    """How many operator rows join a step of `count` user rows, after `before` of them, to be `share` of all in the end.

    Exactly floor(share * rows) after any number of user rows.
    """
    return int((before + count) * share + 1e-9) - int(before * share + 1e-9)


def pick(n: int, count: int, *, seed: int, step: int, stream: str) -> list[int]:
    """`count` distinct indices below n (fewer if n is smaller), a pure function of (seed, stream, step)."""
    return random.Random(mix(seed, stream, step)).sample(range(n), min(n, count))

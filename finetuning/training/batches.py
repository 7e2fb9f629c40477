"""Which rows a step sees: pure functions of (seed, step), so that a resumed job sees what an uninterrupted one would.

Knows indices only; must not know texts, models or weights.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from finetuning.training.determinism import mix


@dataclass(frozen=True)
class Batches:
    """Batches of `size` over `rows` rows, reshuffled every epoch; a batch may straddle two epochs."""

    rows: int
    size: int
    seed: int
    stream: str = "user"

    def at(self, step: int) -> list[int]:
        """Row indices of a step. Raises ValueError without rows."""
        if self.rows < 1:
            raise ValueError(f"the {self.stream} stream has no rows")
        return [
            _order(self.rows, self.seed, self.stream, i // self.rows)[i % self.rows]
            for i in range(step * self.size, (step + 1) * self.size)
        ]


@lru_cache(maxsize=4)  # a step touches one epoch, at most a few; shuffling 200,000 rows for each would cost hours
def _order(rows: int, seed: int, stream: str, epoch: int) -> tuple[int, ...]:
    order = list(range(rows))
    random.Random(mix(seed, stream, epoch)).shuffle(order)
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


def mixed_in(step: int, batch_size: int, share: float) -> int:
    """How many operator rows join step `step` so that they are `share` * batch_size a step on average."""
    return int((step + 1) * batch_size * share + 1e-9) - int(step * batch_size * share + 1e-9)


def pick(n: int, count: int, *, seed: int, step: int, stream: str) -> list[int]:
    """`count` distinct indices below n (fewer if n is smaller), a pure function of (seed, stream, step)."""
    return random.Random(mix(seed, stream, step)).sample(range(n), min(n, count))

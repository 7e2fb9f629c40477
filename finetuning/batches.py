"""Which rows a step sees: pure functions of (seed, step), so that a resumed job sees what an uninterrupted one would.

Knows indices only; must not know texts, models or weights.
"""

import random
from dataclasses import dataclass

from finetuning.determinism import mix


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
        return [self._order(i // self.rows)[i % self.rows] for i in range(step * self.size, (step + 1) * self.size)]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(self.rows))
        random.Random(mix(self.seed, self.stream, epoch)).shuffle(order)
        return order


def mixed_in(step: int, batch_size: int, share: float) -> int:
    """How many operator rows join step `step` so that they are `share` * batch_size a step on average."""
    return int((step + 1) * batch_size * share + 1e-9) - int(step * batch_size * share + 1e-9)


def pick(n: int, count: int, *, seed: int, step: int, stream: str) -> list[int]:
    """`count` distinct indices below n (fewer if n is smaller), a pure function of (seed, stream, step)."""
    return random.Random(mix(seed, stream, step)).sample(range(n), min(n, count))

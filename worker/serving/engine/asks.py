"""What goes into the engine and what comes out: asks with their adapter and sampling, and the events of an answer."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from worker.serving.engine.sampling import Sampling, TokenLogprob


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of one engine. `cached_tokens` counts rows times their longest possible length, padding included."""

    rows: int = 16
    cached_tokens: int = 32_768
    waiting: int = 64
    adapters: int = 8
    prefill_tokens: int = 256

    @property
    def asks(self) -> int:
        """How many may be open at once."""
        return self.waiting + self.rows

    @property
    def asks_of_a_tenant(self) -> int:
        """How many of them may be one tenant's, so that there is room for another."""
        return max(1, self.asks // 2)


@dataclass(frozen=True)
class ServedAdapter:
    """A peft folder and the name under which it is attached."""

    name: str
    folder: Path


@dataclass(frozen=True)
class Piece:
    """Text of one choice that may be shown, and the logprobs of the tokens behind it."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Ended:
    """A choice is complete; `tokens` were drawn for it, the end-of-answer token included."""

    choice: int
    reason: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True)
class Broken:
    """The engine could not go on with this ask; nothing more follows."""


EngineEvent = Piece | Ended | Broken


@dataclass(frozen=True)
class Ask:
    """One request. `deliver` is called on the engine's thread and returns at once; anyone may set `cancelled`.

    Asks of one `tenant`, whoever that is, take turns with those of others.
    """

    prompt: tuple[int, ...]
    adapter: ServedAdapter | None
    sampling: Sampling
    new_tokens: int
    deliver: Callable[[EngineEvent], None]
    choices: int = 1
    stops: tuple[str, ...] = ()
    seed: int | None = None
    tenant: str = ""
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def longest(self) -> int:
        """Positions that one choice may come to fill."""
        return len(self.prompt) + self.new_tokens


class EngineFull(Exception):
    """Too many asks are waiting, of all tenants or of this one; nothing was done."""

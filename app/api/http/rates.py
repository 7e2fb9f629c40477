"""How often: requests of a key, tokens of a project, wrong keys of an address, answers in progress.

Counted by each API process for itself, so a service of several gives that much several times.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from threading import Lock

from app.core.errors import RateLimited
from app.core.settings import EdgeSettings

_MOST_OWNERS = 10_000
_OWN_BITS = 64  # of an IPv6 address: whoever has one has all that differ in these


@dataclass(frozen=True)
class Standing:
    """What is left of a rate: `reset_seconds` until all of it is back, `wait_seconds` until what was asked for is."""

    limit: int
    remaining: int
    reset_seconds: float
    wait_seconds: float = 0.0


class Rate:
    """So much a minute for each owner, which comes back steadily. Any thread may call."""

    def __init__(self, per_minute: int) -> None:
        self._limit = per_minute
        self._used: OrderedDict[object, tuple[float, float]] = OrderedDict()  # how much, and when that was so
        self._lock = Lock()

    def take(self, owner: object, amount: float = 1.0) -> Standing:
        """Use up an amount, unless more than is left: then `wait_seconds` is above 0 and nothing is used."""
        amount = min(amount, self._limit)
        with self._lock:
            used = self._now(owner)
            too_much = used + amount - self._limit
            return self._set(owner, used if too_much > 0 else used + amount, too_much)

    def change(self, owner: object, amount: float) -> Standing:
        """Use up an amount whatever is left, or give a negative one back."""
        with self._lock:
            return self._set(owner, min(max(0.0, self._now(owner) + amount), 2.0 * self._limit), 0.0)

    def _now(self, owner: object) -> float:
        used, then = self._used.get(owner, (0.0, 0.0))
        return max(0.0, used - (time.monotonic() - then) * self._limit / 60)

    def _set(self, owner: object, used: float, missing: float) -> Standing:
        self._used[owner] = (used, time.monotonic())
        self._used.move_to_end(owner)
        if len(self._used) > _MOST_OWNERS:
            self._used.popitem(last=False)
        seconds = 60 / self._limit
        return Standing(self._limit, max(0, int(self._limit - used)), used * seconds, max(0.0, missing * seconds))


class Rates:
    """The rates of one API process."""

    def __init__(self, edge: EdgeSettings) -> None:
        self.requests, self.tokens = Rate(edge.requests_per_minute), Rate(edge.tokens_per_minute)
        self._wrong = Rate(edge.wrong_keys_per_minute)
        self._chats, self._most_chats = Counter[str](), edge.chats
        self._lock = Lock()

    def note_wrong_key(self, address: str) -> None:
        """Count a key that is wrong. Raises RateLimited for an address that sent many.

        Right keys are not asked about the address: behind a proxy it is everybody's, and no key can be guessed.
        """
        wait = self._wrong.take(owner_of(address)).wait_seconds
        if wait:
            raise RateLimited("Too many wrong API keys came from this address. Wait, then send a valid one.", wait)

    @contextmanager
    def chat(self, project_id: str) -> Iterator[None]:
        """One answer in progress. Raises RateLimited when the project has as many as it may have."""
        with self._lock:
            if self._chats[project_id] >= self._most_chats:
                raise RateLimited(f"{self._most_chats} answers are in progress. Wait for one to end.", 1.0)
            self._chats[project_id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._chats[project_id] -= 1
                if not self._chats[project_id]:
                    del self._chats[project_id]


def owner_of(address: str) -> str:
    """What one client is counted by: its IPv4 address, or the network of its IPv6 one; other texts as they are."""
    try:
        found = ip_address(address)
    except ValueError:
        return address
    if not isinstance(found, IPv6Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(IPv6Address(int(found) >> _OWN_BITS << _OWN_BITS))


def rate_headers(kind: str, standing: Standing) -> dict[str, str]:
    """The headers that tell a client where it stands; `kind` is requests or tokens."""
    return {
        f"x-ratelimit-limit-{kind}": str(standing.limit),
        f"x-ratelimit-remaining-{kind}": str(standing.remaining),
        f"x-ratelimit-reset-{kind}": f"{standing.reset_seconds:.3f}s",
    }

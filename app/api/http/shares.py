"""What requests share while they last (places to upload in, memory for bodies): so much in all, so much for one owner.

Shares live on the event loop alone.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from app.core.errors import ServiceBusy


@dataclass(eq=False)
class _Waiting:
    owner: str
    amount: int
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Turn:
    """The turn of one thread to compute, so that the event loop waits for one at most; for nothing that waits itself.

    Entering raises ServiceBusy when the turn did not come within `seconds`.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        self._seconds, self._lock = seconds, threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=self._seconds):
            raise ServiceBusy("The server is busy with large requests. Retry in a few seconds.", retry_after=5.0)

    def __exit__(self, *_fault: object) -> None:
        self._lock.release()


class Shares:
    """An amount that is lent in parts; who finds too little left waits in line, and others of their own line do not."""

    def __init__(self, total: int, per_owner: int) -> None:
        self._free, self._per_owner = total, min(per_owner, total)
        self._held: Counter[str] = Counter()
        self._line: list[_Waiting] = []

    @asynccontextmanager
    async def hold(self, owner: str, amount: int, *, seconds: float) -> AsyncGenerator[None]:
        """Hold a part for the length of the block; more than one owner may have counts as that much.

        Raises ServiceBusy when none came free within `seconds`.
        """
        asked = _Waiting(owner, min(amount, self._per_owner))
        self._line.append(asked)
        self._hand_out()
        try:
            async with asyncio.timeout(seconds):
                await asked.turn
        except BaseException as stopped:
            self._leave(asked)
            if isinstance(stopped, TimeoutError):
                message = "Too many requests of this kind are in progress. Wait for some of yours to end, then retry."
                raise ServiceBusy(message, retry_after=5.0) from None
            raise
        try:
            yield
        finally:
            self._give_back(asked)

    def _leave(self, asked: _Waiting) -> None:
        if asked in self._line:
            self._line.remove(asked)
        else:  # its turn came in the same moment
            self._give_back(asked)

    def _give_back(self, asked: _Waiting) -> None:
        self._free += asked.amount
        self._held[asked.owner] -= asked.amount
        if not self._held[asked.owner]:
            del self._held[asked.owner]
        self._hand_out()

    def _hand_out(self) -> None:
        for asked in tuple(self._line):
            if asked.turn.done() or self._held[asked.owner] + asked.amount > self._per_owner:
                continue  # one owner's line does not hold up another's
            if asked.amount > self._free:
                return  # first come, first served: small parts must not overtake a large one for ever
            self._free -= asked.amount
            self._held[asked.owner] += asked.amount
            self._line.remove(asked)
            asked.turn.set_result(None)

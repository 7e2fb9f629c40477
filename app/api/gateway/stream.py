"""A streamed answer: what a model server sends, read event by event, and what the client gets of it.

A task of its own reads the server, so a client that leaves never interrupts a read half-way. A stream that breaks off
always says so.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import ClassVar, cast

import httpx2
import structlog

from app.core.errors import ImmunotuneError, ServiceBusy

Json = dict[str, object]
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
_CHUNKS_AHEAD = 64

_log = structlog.get_logger(__name__)


class ModelServerLost(ServiceBusy):
    """A server broke off. Before the first token nothing was done yet; after it the stream ends with this error."""

    code = "model_server_lost"


class AnswerTimedOut(ImmunotuneError):
    """The answer took longer than the service allows."""

    status = 408
    code = "request_timeout"
    headers: ClassVar[Mapping[str, str]] = {"x-should-retry": "false"}  # the next try would take as long


class AnswerStream:
    """The server-sent events of one answer, made of the chunks of `source`: None when a server has accepted."""

    def __init__(self, source: AsyncGenerator[Json | None], *, chat_seconds: float, ping_seconds: float) -> None:
        self._source = source
        self._ping_seconds = ping_seconds
        self._chat_seconds = chat_seconds
        self._deadline = time.monotonic() + chat_seconds
        # what was read and not yet sent: chunks, then an error or None for a complete answer
        self._chunks: asyncio.Queue[Json | ImmunotuneError | None] = asyncio.Queue(maxsize=_CHUNKS_AHEAD)
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.ensure_future(self._read())

    async def begin(self) -> None:
        """Wait until a server has accepted. Raises what the servers answered instead."""
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                await self._accepted
        except TimeoutError:
            self.close()
            raise timed_out(self._chat_seconds) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop reading the server, which then stops too. Safe to repeat."""
        self._reader.cancel()

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        while True:
            try:
                async with asyncio.timeout(min(self._ping_seconds, self._deadline - time.monotonic())):
                    chunk = await self._chunks.get()
            except TimeoutError:
                if time.monotonic() >= self._deadline:
                    yield _error_event(timed_out(self._chat_seconds))
                    return
                yield PING
                continue
            if chunk is None:
                yield DONE
                return
            if isinstance(chunk, ImmunotuneError):
                yield _error_event(chunk)
                return
            yield _event(chunk)

    async def _read(self) -> None:
        end: ImmunotuneError | None = None
        try:
            async with aclosing(self._source) as source:
                async for chunk in source:
                    if chunk is not None:
                        await self._chunks.put(chunk)
                    elif not self._accepted.done():
                        self._accepted.set_result(None)
        except ImmunotuneError as problem:
            end = problem
        except Exception:  # noqa: BLE001  (a rim: beyond it nobody hears of a task that died)
            # whatever a server sent that nobody thought of: this task must not die without a word to its reader
            _log.exception("model_server.not_understood")
            end = broken_off()
        if end is not None and not self._accepted.done():
            self._accepted.set_exception(end)
        await self._chunks.put(end)


@dataclass
class Reported:
    """What the client has got of an answer, so that a second server does not repeat it."""

    accepted: bool = False
    answered: bool = False
    greeted: set[object] = field(default_factory=set[object])

    def is_new(self, chunk: Json) -> bool:
        """Whether the client has not got this chunk yet; notes that it gets it now."""
        if not _is_greeting(chunk):
            self.answered = True
            return True
        who = tuple(choice.get("index") for choice in _choices(chunk))
        known = who in self.greeted
        self.greeted.add(who)
        return not known


async def read_chunks(reply: httpx2.Response) -> AsyncGenerator[Json]:
    """The JSON of each event up to [DONE].

    Raises ModelServerLost on an error event or an end without [DONE], ValueError on what is no JSON object,
    TransportError.
    """
    async for event in httpx2.EventSource(reply):
        if event.data == "[DONE]":
            return
        if not event.data:
            continue  # a block of other lines only, such as a name, an id or a time to wait
        chunk = as_object(event.json())
        if "error" in chunk:
            raise broken_off()
        yield chunk
    raise broken_off()


def as_object(value: object) -> Json:
    """A JSON object. Raises ValueError when what a model server sent is something else."""
    if not isinstance(value, dict):
        raise ValueError("a model server sent no JSON object")
    return cast(Json, value)


def broken_off() -> ModelServerLost:
    """The end of an answer whose server was lost."""
    return ModelServerLost("The model server broke off before the answer was complete. Send the request again.")


def timed_out(seconds: float) -> AnswerTimedOut:
    """The end of an answer that took too long."""
    return AnswerTimedOut(f"The answer took longer than {seconds:.0f} s. Ask for fewer tokens.")


def _is_greeting(chunk: Json) -> bool:
    # it only says that the assistant speaks now
    choices = _choices(chunk)
    return bool(choices) and all(
        not cast(Json, choice.get("delta") or {}).get("content") and choice.get("finish_reason") is None
        for choice in choices
    )


def _choices(chunk: Json) -> list[Json]:
    return cast(list[Json], chunk.get("choices") or [])


def _event(body: Mapping[str, object]) -> bytes:
    # ASCII only: no character of an answer can pass for a line break
    return b"data: " + json.dumps(body, separators=(",", ":")).encode("ascii") + b"\n\n"


def _error_event(error: ImmunotuneError) -> bytes:
    body = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return _event({"error": body})

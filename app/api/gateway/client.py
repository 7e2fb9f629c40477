"""The one client of every model server: picks a server, hands the request on, passes the answer back.

Knows model server addresses and the chat wire; must not know projects, keys or the database, and keeps no state
between requests. An answer that began is never begun again; a stream that breaks always says so.
"""

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import ClassVar, cast

import httpx2
import structlog

from app.core.errors import ImmunotuneError, InvalidRequest, ServiceBusy

log = structlog.get_logger(__name__)

Json = dict[str, object]
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
CONNECT_SECONDS = 2.0
ATTEMPTS = 2


@dataclass(frozen=True)
class Question:
    """A request for a model server: `served` is the server's name for the model, `model` the client's."""

    served: str
    model: str
    body: Mapping[str, object]
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))


class ModelServerLost(ServiceBusy):
    """A server broke off. Before the first token nothing was done yet; after it the stream ends with this error."""

    code = "model_server_lost"


class AnswerTimedOut(ImmunotuneError):
    """The answer took longer than the service allows."""

    status = 408
    code = "request_timeout"
    headers: ClassVar[Mapping[str, str]] = {"x-should-retry": "false"}  # the next try would take as long


class Gateway:
    """Forwards chat requests; close it when the process ends."""

    def __init__(self, urls: Sequence[str], *, chat_seconds: float = 600.0, ping_seconds: float = 15.0) -> None:
        timeout = httpx2.Timeout(chat_seconds, connect=CONNECT_SECONDS, pool=CONNECT_SECONDS)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
        # trust_env: a proxy of the environment must never see prompts
        self._client = httpx2.AsyncClient(timeout=timeout, limits=limits, trust_env=False)
        self._urls = tuple(url.rstrip("/") for url in urls)
        self._chat_seconds = chat_seconds
        self._ping_seconds = ping_seconds

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def answer(self, question: Question) -> Json:
        """The whole answer. Raises InvalidRequest as the server said, ServiceBusy, AnswerTimedOut."""
        try:
            async with asyncio.timeout(self._chat_seconds):
                return await self._answer(question)
        except TimeoutError:
            raise _timed_out(self._chat_seconds) from None

    async def open_stream(self, question: Question) -> "AnswerStream":
        """A stream whose server has accepted the request. Raises InvalidRequest as the server said, ServiceBusy."""
        stream = AnswerStream(question, self._events(question), self._chat_seconds, self._ping_seconds)
        await stream.begin()
        return stream

    def _servers(self, served: str) -> list[str]:
        """Where to try, in order: the model's own server, then the next one, or the only one again."""
        order = rendezvous(self._urls, served)
        return (order * ATTEMPTS)[:ATTEMPTS]

    async def _answer(self, question: Question) -> Json:
        problem: ImmunotuneError = _no_server()
        for url in self._servers(question.served):
            try:
                reply = await self._client.post(url + "/v1/chat/completions", json=question.body)
                if reply.status_code == 200:
                    return _relabelled(cast(Json, reply.json()), question)
                problem = _refusal(reply.status_code, reply.content)
            except (httpx2.TransportError, ValueError) as error:
                log.warning("model_server.lost", url=url, error=type(error).__name__)
                problem = _no_server()
            if problem.status < 500:
                break
        raise problem

    async def _events(self, question: Question) -> AsyncGenerator[Json | None]:
        """None when a server accepted, then its chunks, up to its [DONE]. Raises the problem otherwise."""
        problem: ImmunotuneError = _no_server()
        told = _Told()
        for url in self._servers(question.served):
            try:
                async with aclosing(self._ask(url, question, told)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                    return
            except (httpx2.TransportError, ValueError) as error:
                log.warning("model_server.lost", url=url, error=type(error).__name__)
                problem = _broken_off() if told.accepted else _no_server()
            except ImmunotuneError as error:
                problem = error
            if told.answered or problem.status < 500:
                break
        raise problem

    async def _ask(self, url: str, question: Question, told: "_Told") -> AsyncGenerator[Json | None]:
        async with self._client.stream("POST", url + "/v1/chat/completions", json=question.body) as reply:
            if reply.status_code != 200:
                raise _refusal(reply.status_code, await reply.aread())
            told.accepted = True
            yield None
            async for chunk in _chunks(reply.aiter_raw()):
                if chunk is _END:
                    return
                if told.is_news(chunk):
                    yield _relabelled(chunk, question)
            raise _broken_off()


@dataclass
class _Told:
    """What the client has heard of an answer, so that a second server does not repeat it."""

    accepted: bool = False
    answered: bool = False
    greeted: set[object] = field(default_factory=set[object])

    def is_news(self, chunk: Json) -> bool:
        if not _is_greeting(chunk):
            self.answered = True
            return True
        who = tuple(choice.get("index") for choice in _choices(chunk))
        known = who in self.greeted
        self.greeted.add(who)
        return not known


class AnswerStream:
    """Server-sent events of one answer. A task of its own reads the server, so a client's going never tears a read."""

    def __init__(
        self, question: Question, source: AsyncGenerator[Json | None], chat_seconds: float, ping_seconds: float
    ) -> None:
        self._source = source
        self._ping_seconds = ping_seconds
        self._chat_seconds = chat_seconds
        self._deadline = time.monotonic() + chat_seconds
        self._news: asyncio.Queue[Json | ImmunotuneError | None] = asyncio.Queue(maxsize=64)
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.ensure_future(self._read())
        self.question = question

    async def begin(self) -> None:
        """Wait until a server has accepted. Raises what the servers answered instead."""
        try:
            await self._accepted
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the server, which then stops. Safe to repeat."""
        self._reader.cancel()

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        while True:
            try:
                async with asyncio.timeout(min(self._ping_seconds, self._deadline - time.monotonic())):
                    news = await self._news.get()
            except TimeoutError:
                if time.monotonic() >= self._deadline:
                    yield _error_event(_timed_out(self._chat_seconds))
                    return
                yield PING
                continue
            if news is None:
                yield DONE
                return
            if isinstance(news, ImmunotuneError):
                yield _error_event(news)
                return
            yield _event(news)

    async def _read(self) -> None:
        end: ImmunotuneError | None = None
        try:
            async with aclosing(self._source) as source:
                async for chunk in source:
                    if chunk is not None:
                        await self._news.put(chunk)
                    elif not self._accepted.done():
                        self._accepted.set_result(None)
        except ImmunotuneError as problem:
            end = problem
        if end is not None and not self._accepted.done():
            self._accepted.set_exception(end)
        await self._news.put(end)


def rendezvous(urls: Sequence[str], served: str) -> list[str]:
    """All servers, best first for this model: every API process agrees, and losing one moves only its own models."""

    def weight(url: str) -> bytes:
        return hashlib.blake2b(f"{url} {served}".encode(), digest_size=16).digest()

    return sorted(urls, key=weight, reverse=True)


_END: Json = {}


async def _chunks(raw: AsyncIterable[bytes]) -> AsyncGenerator[Json]:
    """The JSON of each data event; `_END` for [DONE]. Raises ModelServerLost on an error event, ValueError on noise."""
    waiting = b""
    async for piece in raw:
        *events, waiting = (waiting + piece).split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line == b"data: [DONE]":
                    yield _END
                elif line.startswith(b"data: "):
                    chunk = cast(Json, json.loads(line.removeprefix(b"data: ")))
                    if "error" in chunk:
                        raise _broken_off()
                    yield chunk


def _is_greeting(chunk: Json) -> bool:
    """Whether a chunk only says that the assistant speaks now."""
    choices = _choices(chunk)
    return bool(choices) and all(
        not cast(Json, choice.get("delta") or {}).get("content") and choice.get("finish_reason") is None
        for choice in choices
    )


def _choices(chunk: Json) -> list[Json]:
    return cast(list[Json], chunk.get("choices") or [])


def _relabelled(answer: Json, question: Question) -> Json:
    return {**answer, "id": question.id, "created": question.created, "model": question.model}


def _refusal(status: int, content: bytes) -> ImmunotuneError:
    try:
        said = cast(Json, json.loads(content))["error"]
        assert isinstance(said, dict)
        message, code, param = (cast(Json, said).get(name) for name in ("message", "code", "param"))
    except (ValueError, KeyError, AssertionError):
        message, code, param = None, None, None
    if status == 400:
        return InvalidRequest(str(message), code=str(code), param=str(param) if param else None)
    log.warning("model_server.refused", status=status, code=code)
    if status == 503:
        return ServiceBusy(str(message), code=str(code), retry_after=2.0)
    return _no_server()


def _no_server() -> ServiceBusy:
    return ServiceBusy("No model server answered. Nothing was done; try again in a few seconds.", retry_after=2.0)


def _broken_off() -> ModelServerLost:
    return ModelServerLost("The model server broke off before the answer was complete. Send the request again.")


def _timed_out(seconds: float) -> AnswerTimedOut:
    return AnswerTimedOut(f"The answer took longer than {seconds:.0f} s. Ask for fewer tokens.")


def _event(body: Mapping[str, object]) -> bytes:
    # ASCII only: no character of an answer can pass for a line break
    return b"data: " + json.dumps(body, separators=(",", ":")).encode("ascii") + b"\n\n"


def _error_event(error: ImmunotuneError) -> bytes:
    body = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return _event({"error": body})

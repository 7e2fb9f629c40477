"""The client of all model servers: picks one, hands the request on, passes the answer back.

It keeps no state between requests. An answer that began is never begun again. Must not know projects, keys or the
database: whoever asks has resolved the model already.
"""

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import httpx2
import structlog

from app.api.gateway.stream import AnswerStream, Json, Reported, as_object, broken_off, read_chunks, timed_out
from app.core.errors import ImmunotuneError, InvalidRequest, ServiceBusy

log = structlog.get_logger(__name__)

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


class Gateway:
    """Forwards chat requests; close it when the process ends."""

    def __init__(
        self, urls: Sequence[str], *, secret: str = "", chat_seconds: float = 600.0, ping_seconds: float = 15.0
    ) -> None:
        """`secret` is what the servers know us by."""
        timeout = httpx2.Timeout(chat_seconds, connect=CONNECT_SECONDS, pool=CONNECT_SECONDS)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
        # trust_env: a proxy of the environment must never see prompts
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        self._client = httpx2.AsyncClient(timeout=timeout, limits=limits, headers=headers, trust_env=False)
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
            raise timed_out(self._chat_seconds) from None

    async def open_stream(self, question: Question) -> AnswerStream:
        """A stream whose server has accepted the request. Raises InvalidRequest as the server said, ServiceBusy."""
        stream = AnswerStream(self._chunks(question), chat_seconds=self._chat_seconds, ping_seconds=self._ping_seconds)
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
                    return _relabelled(as_object(reply.json()), question)
                problem = _refusal(reply.status_code, reply.content)
            except (httpx2.TransportError, ValueError) as error:
                log.warning("model_server.lost", url=url, error=type(error).__name__)
                problem = _no_server()
            if problem.status < 500:
                break
        raise problem

    async def _chunks(self, question: Question) -> AsyncGenerator[Json | None]:
        """None when a server accepted, then its chunks, up to its [DONE]. Raises the problem otherwise."""
        problem: ImmunotuneError = _no_server()
        reported = Reported()
        for url in self._servers(question.served):
            try:
                async with aclosing(self._ask(url, question, reported)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                    return
            except (httpx2.TransportError, ValueError) as error:
                log.warning("model_server.lost", url=url, error=type(error).__name__)
                problem = broken_off() if reported.accepted else _no_server()
            except ImmunotuneError as error:
                problem = error
            if reported.answered or problem.status < 500:
                break
        raise problem

    async def _ask(self, url: str, question: Question, reported: Reported) -> AsyncGenerator[Json | None]:
        async with self._client.stream("POST", url + "/v1/chat/completions", json=question.body) as reply:
            if reply.status_code != 200:
                raise _refusal(reply.status_code, await reply.aread())
            reported.accepted = True
            yield None
            async for chunk in read_chunks(reply):
                if reported.is_new(chunk):
                    yield _relabelled(chunk, question)


def rendezvous(urls: Sequence[str], served: str) -> list[str]:
    """All servers, best first for this model: every API process agrees, and losing one moves only its own models."""

    def weight(url: str) -> bytes:
        return hashlib.blake2b(f"{url} {served}".encode(), digest_size=16).digest()

    return sorted(urls, key=weight, reverse=True)


def _relabelled(answer: Json, question: Question) -> Json:
    return {**answer, "id": question.id, "created": question.created, "model": question.model}


def _refusal(status: int, content: bytes) -> ImmunotuneError:
    try:
        said = as_object(as_object(json.loads(content)).get("error"))
    except (ValueError, RecursionError):
        said = {}  # a proxy's own words, say
    message, code, param = (said.get(name) for name in ("message", "code", "param"))
    if status == 401:
        advice = "set the same IMMUNOTUNE_MODEL_SERVER_SECRET on the API and on the model servers"
        log.error("model_server.unauthorized", advice=advice)
    elif status != 400:
        log.warning("model_server.refused", status=status, code=code)
    if status == 400 and message and code:
        return InvalidRequest(str(message), code=str(code), param=str(param) if param else None)
    if status == 503 and message and code:
        return ServiceBusy(str(message), code=str(code), retry_after=2.0)
    return _no_server()


def _no_server() -> ServiceBusy:
    return ServiceBusy("No model server answered. Nothing was done; try again in a few seconds.", retry_after=2.0)

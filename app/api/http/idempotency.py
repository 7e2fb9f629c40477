"""Repeated POSTs: the headers that clients repeat with, and the stored reply that a repeat gets.

`taken_up` is for what has its effect in one transaction, `answer_once` for answers that take minutes.
"""

import hashlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

import structlog
from anyio import CancelScope, to_thread
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from app.api.http.resources import Resources
from app.core import idempotency
from app.core.idempotency import Repeat, in_progress
from app.core.projects import Caller
from app.core.storage.database import DATABASE_DOWN, Database, JsonObject
from app.core.storage.tables import Reply

_log = structlog.get_logger(__name__)

# how much longer than an answer may take, until a process that was to give it counts as dead
_PENDING_GRACE_SECONDS = 30.0
_MOST_STORED_BYTES = 2**20

# requests that this process is answering, by name: how many first attempts, or -1 for one repeat
_answering: dict[str, int] = {}
_lock = threading.Lock()


@contextmanager
def taken_up(request: Request, caller: Caller, meaning: object) -> Iterator[Repeat]:
    """`repeat_of` for the length of the answer. Raises RequestInProgress for a repeat beside an equal request.

    The database orders equal requests too (idempotency.reserve), but not by their arrival: when it was held up, a retry
    can reach it before the first attempt does, which would then be a second effect.
    """
    repeat = repeat_of(request, caller, meaning)
    with _lock:
        now = _answering.get(repeat.name, 0)
        if now < 0 or (now > 0 and not repeat.is_first):
            raise in_progress()
        _answering[repeat.name] = now + 1 if repeat.is_first else -1
    try:
        yield repeat
    finally:
        with _lock:
            left = _answering.pop(repeat.name) - 1
            if left > 0:
                _answering[repeat.name] = left


async def answer_once(
    request: Request,
    caller: Caller,
    resources: Resources,
    answer: Callable[[], Awaitable[Response]],
    *,
    meaning: Callable[[], object],
) -> Response:
    """The answer; under an Idempotency-Key the stored one, if there is one. Whole answers are stored, others forgotten.

    `meaning` is asked for only under a key. Raises InvalidRequest as `idempotency.reserve` does, RequestInProgress, and
    whatever `answer` raises.
    """
    if _key(request) is None:  # the SDK's own retries of an answer are not stored: it holds what a model said
        return await answer()
    repeat = await to_thread.run_sync(lambda: repeat_of(request, caller, meaning()), limiter=resources.computing)
    reply = await to_thread.run_sync(_open_pending, resources, repeat)
    if not idempotency.is_pending(reply):
        headers = {"x-idempotent-replay": "true", "X-Accel-Buffering": "no"}
        return Response(str(reply.body["text"]), media_type=str(reply.body["media_type"]), headers=headers)
    try:
        return _Recorded(await answer(), partial(_end_pending, resources.database, reply.id))
    except BaseException:
        with CancelScope(shield=True):
            await to_thread.run_sync(_end_pending, resources.database, reply.id, None)
        raise


class _Recorded(Response):
    """A response that is noted while it is sent, and handed to `end` afterwards: None unless all of it was."""

    def __init__(self, response: Response, end: Callable[[JsonObject | None], None]) -> None:
        super().__init__()
        self._response, self._end = response, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; it is stored before its end is sent, so that no repeat can come too early."""
        status, sent, is_ended = 0, bytearray(), False

        async def note(message: Message) -> None:
            nonlocal status, is_ended
            status = message.get("status", status)
            if len(sent) <= _MOST_STORED_BYTES:
                sent.extend(message.get("body", b""))
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                is_ended = True
                await self._store(status, bytes(sent))
            await send(message)

        try:
            await self._response(scope, receive, note)
        finally:
            if not is_ended:
                with CancelScope(shield=True):
                    await to_thread.run_sync(self._end, None)

    async def _store(self, status: int, sent: bytes) -> None:
        media_type = self._response.media_type or "application/json"
        # a stream that broke off ends like any other, but without its last line
        is_whole = media_type != "text/event-stream" or sent.endswith(b"data: [DONE]\n\n")
        fits = status == 200 and len(sent) <= _MOST_STORED_BYTES
        body: JsonObject = {"media_type": media_type, "text": sent.decode()} if is_whole and fits else {}
        with CancelScope(shield=True):
            await to_thread.run_sync(self._end, body or None)


def _open_pending(resources: Resources, repeat: Repeat) -> Reply:
    seconds = resources.settings.serving.chat_seconds + _PENDING_GRACE_SECONDS
    with resources.database.writing() as session:
        reply = idempotency.open_pending(session, repeat, seconds=seconds)
        session.commit()
    return reply


def _end_pending(database: Database, reply_id: str, body: JsonObject | None) -> None:
    try:
        with database.writing() as session:
            if body is None:
                idempotency.withdraw(session, reply_id)
            else:
                idempotency.complete(session, reply_id, body)
            session.commit()
    except DATABASE_DOWN as error:
        _log.warning("reply.unstored", reason=type(error).__name__)  # it ends by itself when its time is up


def repeat_of(request: Request, caller: Caller, meaning: object) -> Repeat:
    """What identifies this POST; `meaning` is its body as JSON values, whatever bytes carried it."""
    canonical = json.dumps(meaning, sort_keys=True, separators=(",", ":"))
    return Repeat(
        project_id=caller.project_id,
        api_key_id=caller.key_id,
        route=f"{request.method} {request.scope['path']}",
        body_hash=hashlib.sha256(canonical.encode()).hexdigest(),
        key=_key(request),
        retry_count=_retry_count(request),
    )


def replay(reply: Reply) -> JSONResponse:
    """The stored reply, marked as a replay."""
    return JSONResponse(reply.body, status_code=reply.status, headers={"x-idempotent-replay": "true"})


def _key(request: Request) -> str | None:
    return request.headers.get("idempotency-key")


def _retry_count(request: Request) -> int:
    text = request.headers.get("x-stainless-retry-count", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0

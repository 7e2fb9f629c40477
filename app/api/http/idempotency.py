"""Repeated POSTs: the headers that clients repeat with, and the stored reply that a repeat gets."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request
from fastapi.responses import JSONResponse

from app.core.idempotency import Repeat, in_progress
from app.core.projects import Caller
from app.core.storage.tables import Reply

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

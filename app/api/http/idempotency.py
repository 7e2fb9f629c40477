"""Repeated POSTs: the headers that clients repeat with, and the stored reply that a repeat gets."""

import hashlib
import json

from fastapi import Request
from fastapi.responses import JSONResponse

from app.core.idempotency import Repeat
from app.core.projects import Caller
from app.core.storage.tables import Reply


def repeat_of(request: Request, caller: Caller, meaning: object) -> Repeat:
    """What identifies this POST; `meaning` is its body as JSON values, whatever bytes carried it."""
    canonical = json.dumps(meaning, sort_keys=True, separators=(",", ":"))
    return Repeat(
        project_id=caller.project_id,
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

"""Stored replies of POSTs, so that a request which the SDK repeats has one effect.

Knows keys, hashes and ages; must not know what the routes do.
"""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.core.db import JsonObject
from app.core.tables import Reply


@dataclass(frozen=True)
class Repeat:
    """What makes two POSTs the same: the client's Idempotency-Key, else route and body hash on a counted retry.

    `body_hash`: sha256 hex of the canonical JSON (uploads: purpose, filename, expiry and sha256 of the bytes).
    """

    project_id: str
    route: str
    body_hash: str
    key: str | None = None
    retry_count: int = 0


def lookup(session: Session, repeat: Repeat) -> Reply | None:
    """The stored reply to replay. Raises InvalidRequest `idempotency_key_reused` or `invalid_idempotency_key`."""
    raise NotImplementedError


def store(session: Session, repeat: Repeat, *, status: int, body: JsonObject) -> None:
    """Store a reply in the transaction that made its effect. Raises RequestInProgress when another one just did."""
    raise NotImplementedError

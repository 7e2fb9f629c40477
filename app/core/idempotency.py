"""Stored replies of POSTs, so that a request which the SDK repeats has one effect."""

import re
from dataclasses import dataclass

from sqlalchemy import ColumnElement, delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.core.errors import InvalidRequest, RequestInProgress
from app.core.ids import Prefix, new_id
from app.core.storage.database import JsonObject, db_now
from app.core.storage.tables import Reply

KEY_SECONDS = 86_400.0
RETRY_SECONDS = 600.0
_KEY = re.compile(r"[\x20-\x7e]{1,255}")


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
    if repeat.key is not None:
        return _by_key(session, repeat, repeat.key)
    if repeat.retry_count < 1:
        return None  # a first attempt is a new request, however much it looks like an old one
    return session.scalars(
        select(Reply)
        .where(*_same_route(repeat), Reply.body_hash == repeat.body_hash, Reply.created_at > db_now() - RETRY_SECONDS)
        .order_by(Reply.seq.desc())
        .limit(1)
    ).one_or_none()


def store(session: Session, repeat: Repeat, *, status: int, body: JsonObject) -> None:
    """Store a reply in the transaction that made its effect. Raises RequestInProgress when another one just did."""
    if repeat.key is not None:
        session.execute(delete(Reply).where(*_same_route(repeat), Reply.key == repeat.key, _is_old()))
    session.add(
        Reply(
            id=new_id(Prefix.REQUEST),
            project_id=repeat.project_id,
            route=repeat.route,
            key=repeat.key,
            body_hash=repeat.body_hash,
            status=status,
            body=body,
        )
    )
    try:
        session.flush()
    except IntegrityError as error:
        raise RequestInProgress(
            "A request with this Idempotency-Key is being answered right now. Repeat it in a second.", retry_after=1.0
        ) from error


def forget_old(session: Session) -> int:
    """Delete replies that nobody may ask for again; how many."""
    return len(session.scalars(delete(Reply).where(_is_old()).returning(Reply.id)).all())


def _by_key(session: Session, repeat: Repeat, key: str) -> Reply | None:
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            "The Idempotency-Key must be 1 to 255 printable ASCII characters.", code="invalid_idempotency_key"
        )
    reply = session.scalars(
        select(Reply).where(*_same_route(repeat), Reply.key == key, Reply.created_at > db_now() - KEY_SECONDS)
    ).one_or_none()
    if reply is not None and reply.body_hash != repeat.body_hash:
        raise InvalidRequest(
            "This Idempotency-Key was used with another body. Use a new key for a new request.",
            code="idempotency_key_reused",
        )
    return reply


def _same_route(repeat: Repeat) -> tuple[ColumnElement[bool], ...]:
    return Reply.project_id == repeat.project_id, Reply.route == repeat.route


def _is_old() -> ColumnElement[bool]:
    return Reply.created_at <= db_now() - KEY_SECONDS

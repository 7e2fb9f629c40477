"""Stored replies of POSTs, so that a request which the SDK repeats has one effect."""

import hashlib
import re
from dataclasses import dataclass, replace

from sqlalchemy import ColumnElement, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.core.errors import InvalidRequest, RequestInProgress
from app.core.ids import Prefix, new_id
from app.core.storage.database import JsonObject, db_now, read_clock, try_turn
from app.core.storage.tables import Reply

KEY_SECONDS = 86_400.0
RETRY_SECONDS = 600.0
_KEY = re.compile(r"[\x20-\x7e]{1,255}")
_PENDING = 0  # no HTTP status: the answer is still being made


@dataclass(frozen=True)
class Repeat:
    """What makes two POSTs the same: the client's Idempotency-Key, else route and body hash on a counted retry.

    Both under one API key. `body_hash`: sha256 hex of the canonical JSON (uploads: purpose, filename, expiry and
    sha256 of the bytes).
    """

    project_id: str
    route: str
    body_hash: str
    api_key_id: str = ""
    key: str | None = None
    retry_count: int = 0

    @property
    def is_first(self) -> bool:
        """Whether it is a new request, however much it looks like an old one."""
        return self.key is None and self.retry_count < 1

    @property
    def name(self) -> str:
        """What equal requests have in common."""
        return repr(replace(self, body_hash="" if self.key is not None else self.body_hash, retry_count=0))


def reserve(session: Session, repeat: Repeat) -> Reply | None:
    """Take the request's turn until the transaction ends, before anything is done; a stored reply is to be replayed.

    Raises InvalidRequest `idempotency_key_reused` or `invalid_idempotency_key`, RequestInProgress when an equal one
    has the turn.
    """
    _check_key(repeat)
    # a first attempt may run beside its equals, but no repeat beside any of them
    if not try_turn(session, repeat.name, shared=repeat.is_first):
        raise in_progress()
    if repeat.is_first:
        return None
    reply = _by_key(session, repeat) if repeat.key is not None else _by_body(session, repeat)
    if reply is not None and is_pending(reply):
        raise in_progress()
    return reply


def store(session: Session, repeat: Repeat, *, status: int, body: JsonObject) -> Reply:
    """Store a reply in the transaction that made its effect. Raises RequestInProgress when another one just did."""
    reply = Reply(
        id=new_id(Prefix.REQUEST),
        project_id=repeat.project_id,
        route=repeat.route,
        key=None if repeat.key is None else _scoped(repeat, repeat.key),
        body_hash=_scoped(repeat, repeat.body_hash),
        status=status,
        body=body,
    )
    if repeat.key is not None:
        session.execute(delete(Reply).where(*_same_route(repeat), Reply.key == reply.key, _is_old()))
    session.add(reply)
    try:
        session.flush()
    except IntegrityError as error:
        raise in_progress() from error
    return reply


def open_pending(session: Session, repeat: Repeat, *, seconds: float) -> Reply:
    """The reply to replay, or a new pending one, to `complete` or `withdraw` within `seconds`.

    For answers that no transaction can stay open for; needs `repeat.key`. Raises as `reserve` does.
    """
    reply = reserve(session, repeat)
    if reply is not None:
        return reply
    return store(session, repeat, status=_PENDING, body={"until": read_clock(session) + seconds})


def is_pending(reply: Reply) -> bool:
    """Whether its answer is still being made."""
    return reply.status == _PENDING


def complete(session: Session, reply_id: str, body: JsonObject) -> None:
    """The answer of a pending reply is there."""
    session.execute(update(Reply).where(Reply.id == reply_id, Reply.status == _PENDING).values(status=200, body=body))


def withdraw(session: Session, reply_id: str) -> None:
    """A pending reply gets no answer: the next request under its key is a new one."""
    session.execute(delete(Reply).where(Reply.id == reply_id, Reply.status == _PENDING))


def forget_old(session: Session) -> int:
    """Delete replies that nobody may ask for again; how many."""
    return len(session.scalars(delete(Reply).where(_is_old()).returning(Reply.id)).all())


def _check_key(repeat: Repeat) -> None:
    if repeat.key is not None and not _KEY.fullmatch(repeat.key):
        raise InvalidRequest(
            "The Idempotency-Key must be 1 to 255 printable ASCII characters.", code="invalid_idempotency_key"
        )


def _by_key(session: Session, repeat: Repeat) -> Reply | None:
    assert repeat.key is not None
    keys = Reply.key.in_((_scoped(repeat, repeat.key), repeat.key))  # 0.1 stored them as they came
    reply = session.scalars(
        select(Reply).where(*_same_route(repeat), keys, Reply.created_at > db_now() - KEY_SECONDS).limit(1)
    ).one_or_none()
    if reply is not None and reply.body_hash not in (_scoped(repeat, repeat.body_hash), repeat.body_hash):
        raise InvalidRequest(
            "This Idempotency-Key was used with another body. Use a new key for a new request.",
            code="idempotency_key_reused",
        )
    if reply is not None and is_pending(reply) and float(str(reply.body["until"])) < read_clock(session):
        withdraw(session, reply.id)  # its process died
        return None
    return reply


def _by_body(session: Session, repeat: Repeat) -> Reply | None:
    hashes = Reply.body_hash.in_((_scoped(repeat, repeat.body_hash), repeat.body_hash))
    return session.scalars(
        select(Reply)
        .where(*_same_route(repeat), hashes, Reply.created_at > db_now() - RETRY_SECONDS, Reply.status != _PENDING)
        .order_by(Reply.seq.desc())
        .limit(1)
    ).one_or_none()


def _scoped(repeat: Repeat, text: str) -> str:
    """`text` under this API key, as 64 characters: how keys and hashes are stored."""
    return hashlib.sha256(f"{repeat.api_key_id} {text}".encode()).hexdigest()


def _same_route(repeat: Repeat) -> tuple[ColumnElement[bool], ...]:
    return Reply.project_id == repeat.project_id, Reply.route == repeat.route


def _is_old() -> ColumnElement[bool]:
    return Reply.created_at <= db_now() - KEY_SECONDS


def in_progress() -> RequestInProgress:
    """The answer to a repeat that came while an equal request is being answered."""
    return RequestInProgress("The same request is being answered right now. Repeat it in a second.", retry_after=1.0)

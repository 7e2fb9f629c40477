"""What a worker takes from the broker: messages as this service sends them, and nothing else.

Anything else in a queue (no JSON, no envelope, another task, arguments that are no id) goes to a list of dead letters,
where an operator can look at it, and the worker goes on: kombu's own transport ends the whole process on the first.
"""

import base64
import json
from queue import Empty
from typing import Any, cast

import structlog
from kombu.exceptions import KombuError
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as transport
from redis.exceptions import RedisError

from app.core.broker import CHECK_JOB, DEAD_LETTERS, RUN_JOB

_log = structlog.get_logger(__name__)

_MOST_KEPT = 1000
_SHOWN_CHARS = 2000
_MOST_ID_CHARS = 160
# what decoding, and kombu's handling of a decoded message, make of things that are no message
_NOT_A_MESSAGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError, KombuError)


class NotAMessage(ValueError):
    """Something in a queue that this service never sends."""


class Channel(transport.Channel):
    """Reads a queue past what is no message."""

    def _brpop_read(self, **options: Any) -> object:
        try:
            return super()._brpop_read(**options)
        except Empty:
            raise
        except _NOT_A_MESSAGE as fault:
            self._bury(fault)
            return True

    def _bury(self, fault: Exception) -> None:
        found = getattr(fault, "doc", None) or getattr(fault, "object", None) or str(fault)
        text = found.decode("utf-8", "replace") if isinstance(found, bytes) else str(found)
        reason = type(fault).__name__ if not isinstance(fault, NotAMessage) else "NotAMessage"
        _log.error("message.buried", reason=reason, chars=len(text), kept_in=DEAD_LETTERS)
        try:
            with self.conn_or_acquire() as client:
                client.lpush(DEAD_LETTERS, json.dumps({"reason": reason, "text": text[:_SHOWN_CHARS]}))
                client.ltrim(DEAD_LETTERS, 0, _MOST_KEPT - 1)
        except (RedisError, OSError) as error:
            _log.warning("message.lost", error=type(error).__name__)


class Transport(transport.Transport):
    """Hands on what is a message of ours."""

    Channel = Channel

    def _deliver(self, message: object, queue: str) -> None:
        if not is_ours(message):
            raise NotAMessage(json.dumps(message))
        super()._deliver(message, queue)


def guard_transport() -> None:
    """From now on this process reads brokers of the kinds that we use by the transport above."""
    for kind in ("redis", "rediss"):
        TRANSPORT_ALIASES[kind] = f"{__name__}:Transport"


def is_ours(message: object) -> bool:
    """Whether a decoded message is one that `broker.wake` sends: a task of ours with one id."""
    try:
        envelope = cast(dict[str, Any], message)
        arguments, options, _ = json.loads(base64.b64decode(envelope["body"], validate=True))
        (job_id,) = arguments
    except _NOT_A_MESSAGE:
        return False
    return _is_plain(envelope) and not options and isinstance(job_id, str) and _is_id(job_id)


def _is_plain(envelope: dict[str, Any]) -> bool:
    # Celery believes its own headers: one that is not as it sends it can end the worker, or leave it waiting for ever
    match (envelope.get("headers"), envelope.get("properties"), envelope.get("content-type")):
        case (
            {"id": str(), "task": task, "eta": None, "expires": None, "timelimit": [None, None], "retries": 0},
            {"delivery_tag": str(), "delivery_info": dict(), "body_encoding": "base64"},
            "application/json",
        ):
            return task in (CHECK_JOB, RUN_JOB)
        case _:
            return False


def _is_id(text: str) -> bool:
    return 0 < len(text) <= _MOST_ID_CHARS and text.isascii() and text.isprintable()

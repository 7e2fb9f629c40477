"""Ids: a prefix that says what a row is, then characters that sort by creation time.

The API promises prefixes and widths. The time inside an id only keeps indexes local; nothing compares it, stored times
come from the database.
"""

import re
import secrets
import time
from enum import Enum

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_TIME_BITS = 48


class Prefix(Enum):
    """Prefix and number of characters after it."""

    ORG = ("org-", 16)
    PROJECT = ("proj_", 16)
    KEY = ("key_", 24)
    FILE = ("file-", 22)
    JOB = ("ftjob-", 24)
    EVENT = ("ftevent-", 24)
    CHECKPOINT = ("ftckpt-", 24)
    ARTIFACT = ("art_", 24)
    WORKER = ("worker_", 24)
    REQUEST = ("req_", 24)
    DEPLOYMENT = ("dep_", 24)


def new_id(prefix: Prefix) -> str:
    """A new unguessable id; later ids sort after earlier ones to the millisecond."""
    text, width = prefix.value
    random_bits = (len(ALPHABET) ** width).bit_length() - 1 - _TIME_BITS
    stamp = time.time_ns() // 1_000_000
    return text + _base62((stamp << random_bits) | secrets.randbits(random_bits), width)


def is_id(prefix: Prefix, value: str) -> bool:
    """Whether `value` has the shape of such an id, which is not to say that it exists."""
    text, width = prefix.value
    return re.fullmatch(f"{re.escape(text)}[A-Za-z0-9]{{{width}}}", value) is not None


def random_text(length: int) -> str:
    """`length` unguessable base62 characters."""
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def _base62(number: int, width: int) -> str:
    digits: list[str] = []
    for _ in range(width):
        number, digit = divmod(number, 62)
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))

"""One strict reading of a JSON text: its value, or its faults with their places.

RFC 8259, and stricter: no repeated keys, finite numbers, safe integers, bounded depth, real text. Two ways in: a fast
one for good texts, a slow one that finds places once something is wrong.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

Path = tuple[str | int, ...]

MAX_DEPTH = 32
MAX_INTEGER = 2**53
MAX_FAULTS = 16
_POINTER_PART_CHARS = 64
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},:]|[^\s\[\]{},:"]++', re.DOTALL)
_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
_INTEGER = re.compile(r"-?\d+")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong in a text; `position` is a 0-based code point, `path` leads to the value."""

    code: str
    position: int
    path: Path
    message: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value or a key (`is_key`) stands: code points `start` to `start + len(token)`."""

    path: Path
    start: int
    token: str
    is_key: bool = False
    is_repeated: bool = False


class JsonReader:
    """Reads texts one after another; holds the decoder and one flag, so use one per thread."""

    def __init__(self) -> None:
        self._is_odd = False
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._pairs,
            parse_constant=self._constant,
            parse_int=self._integer,
            parse_float=self._float,
        )
        self._encoder = json.JSONEncoder(
            ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"), check_circular=False
        )

    def read(self, text: str) -> tuple[object, bytes] | list[Fault]:
        """The value and its canonical UTF-8 bytes, or the faults (at least one)."""
        early = _early_fault(text)
        if early is not None:
            return [early]
        self._is_odd = False
        try:
            value = cast(object, self._decoder.decode(text))
        except json.JSONDecodeError as wrong:
            return [_syntax_fault(text, wrong)]
        if self._is_odd:
            return find_faults(text)
        canonical = self._encoder.encode(value)
        try:
            encoded = canonical.encode()
        except UnicodeEncodeError:
            return find_faults(text)
        if "\\u0000" in canonical:
            return find_faults(text) or (value, encoded)
        return value, encoded

    def _pairs(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        value = dict(pairs)
        if len(value) != len(pairs):
            self._is_odd = True
        return value

    def _constant(self, _: str) -> int:
        self._is_odd = True
        return 0

    def _integer(self, digits: str) -> int:
        if _is_safe_integer(digits):
            return int(digits)
        self._is_odd = True
        return 0

    def _float(self, digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            self._is_odd = True
        return value


def sha256_of(canonical: bytes) -> str:
    """The hash that names a row: SHA-256 of its canonical bytes (sorted keys, no spaces, UTF-8), in hex."""
    return hashlib.sha256(canonical).hexdigest()


def find_faults(text: str) -> list[Fault]:
    """The forbidden things in a syntactically valid text, in order of place, at most MAX_FAULTS."""
    found: list[Fault] = []
    for place in walk(text):
        if place.is_repeated:
            message = "this key appears twice in one object; keep one of them"
            found.append(Fault("duplicate_key", place.start, place.path, message))
        wrong = _token_fault(place.token)
        if wrong is not None:
            found.append(Fault(wrong[0], place.start, place.path, wrong[1]))
        if len(found) >= MAX_FAULTS:
            break
    return found


def locate(text: str, wanted: Iterable[tuple[Path, bool]]) -> dict[tuple[Path, bool], int]:
    """The 0-based code points of values (path, False) and keys (path, True), in one walk over a valid text.

    What does not exist stands where its nearest parent does.
    """
    targets = set(wanted)
    values = {path[:depth] for path, _ in targets for depth in range(len(path) + 1)}
    found: dict[tuple[Path, bool], int] = {}
    missing = len(targets)
    for place in walk(text):
        name = (place.path, place.is_key)
        if name not in found and (name in targets or (not place.is_key and place.path in values)):
            found[name] = place.start
            missing -= name in targets
            if not missing:
                break
    return {target: _nearest(found, target) for target in targets}


def _nearest(found: dict[tuple[Path, bool], int], target: tuple[Path, bool]) -> int:
    if target in found:
        return found[target]
    path = target[0]
    return next((found[path[:n], False] for n in range(len(path), -1, -1) if (path[:n], False) in found), 0)


def pointer(path: Path) -> str:
    """The JSON pointer (RFC 6901) of a path; long keys are cut so that a report stays small."""
    parts = (str(part)[:_POINTER_PART_CHARS].replace("~", "~0").replace("/", "~1") for part in path)
    return printable("".join(f"/{part}" for part in parts))


def printable(text: str) -> str:
    """The text with lone surrogates and control characters replaced, safe to store and to show."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def walk(text: str) -> Iterator[Place]:
    """Every key and value of a valid JSON text, in order."""
    path: list[str | int] = []
    keys: list[set[str] | None] = []
    expects_key = False
    for match in _TOKEN.finditer(text):
        token, start = match.group(), match.start()
        match sign := token[0]:
            case "{" | "[":
                yield Place(tuple(path), start, token)
                expects_key = sign == "{"
                keys.append(set() if expects_key else None)
                path.append("" if expects_key else 0)
            case "}" | "]":
                keys.pop()
                path.pop()
                expects_key = False
            case ",":
                expects_key = keys[-1] is not None
                if not expects_key:
                    path[-1] = cast(int, path[-1]) + 1
            case ":":
                expects_key = False
            case '"' if expects_key:
                seen, key = cast(set[str], keys[-1]), cast(str, json.loads(token, strict=False))
                path[-1] = key
                yield Place(tuple(path), start, token, is_key=True, is_repeated=key in seen)
                seen.add(key)
            case _:
                yield Place(tuple(path), start, token)


def _early_fault(text: str) -> Fault | None:
    if "\x00" in text:
        return Fault("nul_character", text.index("\x00"), (), "a NUL character stands here; remove it")
    if text.count("[") + text.count("{") > MAX_DEPTH:
        position = _too_deep_at(text)
        if position is not None:
            return Fault("nesting_too_deep", position, (), f"nested deeper than {MAX_DEPTH} levels; flatten it")
    return None


def _too_deep_at(text: str) -> int | None:
    depth = 0
    for match in _BRACKET.finditer(text):
        sign = text[match.start()]
        if sign in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                return match.start()
        elif sign in "]}":
            depth -= 1
    return None


def _syntax_fault(text: str, wrong: json.JSONDecodeError) -> Fault:
    position = min(wrong.pos, len(text))
    reason = wrong.msg[:1].lower() + wrong.msg[1:]
    if position < len(text) and not text[:position].strip(" \t\r\n") and text[position] == "\ufeff":
        reason = "a byte order mark is allowed only at the start of the file"
    elif wrong.msg.startswith("Extra data"):
        reason = "something follows the first value; put one object on each line"
    return Fault("invalid_json", position, (), f"not valid JSON: {reason}")


def _token_fault(token: str) -> tuple[str, str] | None:
    if token[0] == '"':
        return _string_fault(token)
    if token[0] not in "-0123456789NI":
        return None
    if _INTEGER.fullmatch(token):
        if _is_safe_integer(token):
            return None
        return "number_out_of_range", "integers must lie within -2^53 and 2^53"
    if token in ("NaN", "Infinity", "-Infinity") or not math.isfinite(float(token)):
        return "non_finite_number", "NaN and infinities are not numbers in JSON; use a finite number or null"
    return None


def _string_fault(token: str) -> tuple[str, str] | None:
    if "\\u" not in token:
        return None
    text = cast(str, json.loads(token))
    if "\x00" in text:
        return "nul_character", r"the text holds a NUL character (\u0000); remove it"
    if _SURROGATE.search(text):
        return (
            "lone_surrogate",
            r"the text holds half of a surrogate pair (\ud800 to \udfff); write the whole character",
        )
    return None


def _is_safe_integer(digits: str) -> bool:
    return len(digits) <= 17 and -MAX_INTEGER <= int(digits) <= MAX_INTEGER

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
from itertools import islice
from typing import cast

Path = tuple[str | int, ...]

_WRONG = {
    "duplicate_key": "this key appears twice in one object; keep one of them",
    "number_out_of_range": "integers must lie within -2^53 and 2^53",
    "non_finite_number": "NaN and infinities are not numbers in JSON; use a finite number or null",
    "nul_character": r"the text holds a NUL character (\u0000); remove it",
    "lone_surrogate": r"the text holds half of a surrogate pair (\ud800 to \udfff); write the whole character",
}

MAX_DEPTH = 32
MAX_INTEGER = 2**53
MAX_FAULTS = 16
# of one text; the decoder holds the interpreter while it makes them, some 30 ms for so many
MAX_VALUES = 320_000
_PLACES_OF_TEXT, _PLACES_IN_ALL = 50_000, 2_000_000
_POINTER_PART_CHARS = 64
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},:]|[^\s\[\]{},:"]++', re.DOTALL)
_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]', re.DOTALL)
_SEPARATOR = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{,]', re.DOTALL)
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
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


@dataclass(slots=True)
class Patience:
    """How many keys and values may still be walked over to say where a fault is, of all texts; of one: 50,000.

    A walk costs some fifty times what reading costs, so a hostile text must not get as many as it has values.
    """

    places: int = _PLACES_IN_ALL

    def walk(self, text: str) -> Iterator[Place]:
        """The text's keys and values in order, as far as patience goes."""
        for place in islice(walk(text), max(0, min(_PLACES_OF_TEXT, self.places))):
            self.places -= 1
            yield place


class JsonReader:
    """Reads texts one after another; holds the decoder and one flag, so use one per thread."""

    def __init__(self, patience: Patience | None = None, *, most_keys: int | None = None) -> None:
        self._odd: str | None = None
        self._patience = patience or Patience()
        self._most_keys = most_keys
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
        found = self._decode(text)
        return found if isinstance(found, list) else self._encode(text, found[0])

    def read_value(self, text: str) -> tuple[object] | list[Fault]:
        """The value alone, which is quicker; `text` was decoded from UTF-8."""
        found = self._decode(text)
        if isinstance(found, list) or "\\u" not in text:
            return found
        encoded = self._encode(text, found[0])  # only an escape can hide half a character, or none
        return encoded if isinstance(encoded, list) else found

    def _decode(self, text: str) -> tuple[object] | list[Fault]:
        early = _early_fault(text)
        if early is not None:
            return [early]
        self._odd = None
        try:
            value = cast(object, self._decoder.decode(text))
        except json.JSONDecodeError as wrong:
            return [_syntax_fault(text, wrong)]
        return (value,) if self._odd is None else self._faults(text, self._odd)

    def _encode(self, text: str, value: object) -> tuple[object, bytes] | list[Fault]:
        canonical = self._encoder.encode(value)
        try:
            encoded = canonical.encode()
        except UnicodeEncodeError:
            return self._faults(text, "lone_surrogate")
        return self._faults(text, "nul_character") if _NUL.search(canonical) else (value, encoded)

    def _faults(self, text: str, code: str) -> list[Fault]:
        if code == "too_many_keys":
            return [Fault(code, 0, (), f"an object has more than {self._most_keys} keys; send fewer")]
        message = f"{_WRONG[code]}; it stands behind too many values to say where"
        return find_faults(text, self._patience) or [Fault(code, 0, (), message)]

    def _pairs(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        value = dict(pairs)
        if len(value) != len(pairs):
            self._odd = self._odd or "duplicate_key"
        if self._most_keys is not None and len(pairs) > self._most_keys:
            self._odd = "too_many_keys"
        return value

    def _constant(self, _: str) -> int:
        self._odd = self._odd or "non_finite_number"
        return 0

    def _integer(self, digits: str) -> int:
        if _is_safe_integer(digits):
            return int(digits)
        self._odd = self._odd or "number_out_of_range"
        return 0

    def _float(self, digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            self._odd = self._odd or "non_finite_number"
        return value


def sha256_of(canonical: bytes) -> str:
    """The hash that names a row: SHA-256 of its canonical bytes (sorted keys, no spaces, UTF-8), in hex."""
    return hashlib.sha256(canonical).hexdigest()


def find_faults(text: str, patience: Patience | None = None) -> list[Fault]:
    """The forbidden things in a syntactically valid text, in order of place, at most MAX_FAULTS; none when all stand
    behind more places than there is patience for.
    """
    found: list[Fault] = []
    for place in (patience or Patience()).walk(text):
        if place.is_repeated:
            found.append(Fault("duplicate_key", place.start, place.path, _WRONG["duplicate_key"]))
        wrong = _token_fault(place.token)
        if wrong is not None:
            found.append(Fault(wrong[0], place.start, place.path, wrong[1]))
        if len(found) >= MAX_FAULTS:
            break
    return found


def locate(
    text: str, wanted: Iterable[tuple[Path, bool]], patience: Patience | None = None
) -> dict[tuple[Path, bool], int]:
    """The 0-based code points of values (path, False) and keys (path, True), in one walk over a valid text.

    What does not exist, or stands behind more places than there is patience for, stands where its nearest parent does.
    """
    targets = set(wanted)
    values = {path[:depth] for path, _ in targets for depth in range(len(path) + 1)}
    found: dict[tuple[Path, bool], int] = {}
    missing = len(targets)
    for place in (patience or Patience()).walk(text):
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
    if _has_too_many_values(text):
        message = f"the text has more than {MAX_VALUES} values; send less at once"
        return Fault("too_many_values", 0, (), message)
    if text.count("[") + text.count("{") > MAX_DEPTH:
        position = _too_deep_at(text)
        if position is not None:
            return Fault("nesting_too_deep", position, (), f"nested deeper than {MAX_DEPTH} levels; flatten it")
    return None


def _has_too_many_values(text: str) -> bool:
    # every value but the first follows one of these signs; only a text that holds many of them is looked at closely
    if text.count(",") + text.count("[") + text.count("{") <= MAX_VALUES:
        return False
    signs = (match for match in _SEPARATOR.finditer(text) if text[match.start()] != '"')
    return next(islice(signs, MAX_VALUES, None), None) is not None


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
        return "number_out_of_range", _WRONG["number_out_of_range"]
    if token in ("NaN", "Infinity", "-Infinity") or not math.isfinite(float(token)):
        return "non_finite_number", _WRONG["non_finite_number"]
    return None


def _string_fault(token: str) -> tuple[str, str] | None:
    if "\\u" not in token:
        return None
    text = cast(str, json.loads(token))
    if "\x00" in text:
        return "nul_character", _WRONG["nul_character"]
    if _SURROGATE.search(text):
        return "lone_surrogate", _WRONG["lone_surrogate"]
    return None


def _is_safe_integer(digits: str) -> bool:
    return len(digits) <= 17 and -MAX_INTEGER <= int(digits) <= MAX_INTEGER

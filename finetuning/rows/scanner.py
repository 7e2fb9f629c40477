"""Rows of an uploaded file: scanned as the bytes stream in, then read again by those who train on them.

A scan holds one line and the hashes of the rows seen, never the file. Must not know HTTP, storage or any base.
"""

import hashlib
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import cast

from finetuning.rows.report import Findings, RowError, RowReport
from finetuning.rows.shapes import WARNINGS, Format, Problem, check_row, format_of, row_uses_tools, text_of
from finetuning.rows.strict_json import Fault, JsonReader, Patience, pointer, sha256_of

__all__ = ["InvalidRowError", "Message", "Row", "RowError", "RowReport", "RowScanner", "iter_rows", "rows_of"]

MAX_FILE_BYTES = 512 * 2**20
MAX_LINE_BYTES = 2 * 2**20
MAX_ROWS = 200_000
MAX_KEYS = 1000  # of one object
MAX_SECONDS = 900.0  # of computing, not of waiting for the client

_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 16
_BEGINNING_BYTES = 64
_BLANK = b" \t\r"
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"PK\x07\x08": "zip",
    b"PAR1": "parquet",
    b"(\xb5/\xfd": "zstandard",
    b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf'\x1c": "7z",
    b"\x04\x22\x4d\x18": "lz4",
    b"ARROW1": "arrow",
    b"BZh": "bzip2",
}
# where the zero bytes lie when ASCII is written in UTF-16 or UTF-32, either byte order
_WIDE_ZEROS = {
    (False, True, False, True),
    (True, False, True, False),
    (False, True, True, True),
    (True, True, True, False),
}
_ARRAY_BEGINS = re.compile(rb"[ \t\r]*\[[ \t\r]*(?:\{|$)")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; role is system, user, assistant or tool; weight 1 marks text to learn from."""

    role: str
    content: str
    weight: int


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a checked file: its 1-based line there, its hash, its turns."""

    line: int
    sha256: str
    messages: tuple[Message, ...]
    uses_tools: bool = False


class InvalidRowError(ValueError):
    """A row that should have been checked is not valid; says the line and the code."""


def iter_rows(path: FilePath) -> Iterator[Row]:
    """The rows of a checked chat or completion file, in file order. Raises InvalidRowError, OSError."""
    with path.open("rb") as lines:
        yield from rows_of(lines)


def rows_of(lines: Iterable[bytes]) -> Iterator[Row]:
    """The same from lines split on LF. Raises InvalidRowError on the first row that a scan would have refused."""
    reader = JsonReader()
    for number, raw in enumerate(lines, start=1):
        line = raw.removeprefix(_BOM) if number == 1 else raw
        line = line.removesuffix(b"\n")
        if line.strip(_BLANK):
            yield _read_row(reader, number, line)


def _read_row(reader: JsonReader, number: int, line: bytes) -> Row:
    try:
        outcome = reader.read(line.decode())
    except UnicodeDecodeError as wrong:
        raise InvalidRowError(f"line {number}: invalid_encoding") from wrong
    if isinstance(outcome, list):
        raise InvalidRowError(f"line {number}: {outcome[0].code}")
    value, canonical = outcome
    if not isinstance(value, dict):
        raise InvalidRowError(f"line {number}: not_an_object")
    row = cast(dict[str, object], value)
    code = next((problem.code for problem in check_row(row) if problem.code not in WARNINGS), None)
    if code is not None or format_of(row) == "dpo":
        raise InvalidRowError(f"line {number}: {code or 'format_method_mismatch'}")
    return Row(number, sha256_of(canonical), _messages_of(row), row_uses_tools(row))


def _messages_of(row: dict[str, object]) -> tuple[Message, ...]:
    if "messages" not in row:
        return Message("user", str(row["prompt"]), 0), Message("assistant", str(row["completion"]), 1)
    return tuple(_message_of(message) for message in cast(list[dict[str, object]], row["messages"]))


def _message_of(message: dict[str, object]) -> Message:
    role = "system" if message["role"] == "developer" else str(message["role"])
    weight = cast(int, message.get("weight", 1)) if role == "assistant" else 0
    return Message(role, text_of(message.get("content")), weight)


class RowScanner:
    """Checks a file while its bytes arrive: `feed` pieces of any size, then `close` once for the report.

    The report depends on the bytes alone, never on how they were cut, unless checking takes longer than `max_seconds`.
    """

    def __init__(
        self, *, max_file_bytes: int = MAX_FILE_BYTES, max_rows: int = MAX_ROWS, max_seconds: float = MAX_SECONDS
    ) -> None:
        self._max_file_bytes, self._max_rows = max_file_bytes, max_rows
        self._seconds_left = max_seconds
        patience = Patience()
        self._reader, self._found = JsonReader(patience, most_keys=MAX_KEYS), Findings(patience)
        self._first_line_of: dict[
            bytes, int
        ] = {}  # by half of a row's hash: two rows that share it by chance do not occur
        self._head: bytearray | None = bytearray()
        self._rest = bytearray()  # the line begun but not ended
        self._skips_line = False
        self._line, self._offset, self._received, self._rows = 1, 0, 0, 0
        self._format: Format | None = None
        self._is_mixed = False
        self._array_line: int | None = None
        self._first_tools_line: int | None = None
        self._file_code: str | None = None

    def feed(self, piece: bytes) -> None:
        """Take the next bytes. Never raises on their content; after a file error the rest is ignored."""
        started = time.thread_time()
        self._take(piece)
        self._seconds_left -= time.thread_time() - started
        if self._seconds_left < 0 and self._file_code is None:
            self._refuse("validation_timeout", "checking the file takes too long; split it")
            self._rest = bytearray()

    def _take(self, piece: bytes) -> None:
        self._received += len(piece)
        if self._head is None:
            self._split(piece)
            return
        missing = _HEAD_BYTES - len(self._head)
        self._head += piece[:missing]
        if len(self._head) == _HEAD_BYTES:
            self._open()
            self._split(piece[missing:])

    def close(self) -> RowReport:
        """The report; call it once, after the last piece."""
        if self._head is not None:
            self._open()
        if self._file_code is None:
            self._close_line()
        if self._received > self._max_file_bytes:
            message = f"the file is larger than {self._max_file_bytes} bytes; split it"
            self._refuse("file_too_large", message, line=1)
        found = self._found
        return RowReport(
            format=self._format,
            rows=self._rows,
            invalid_rows=found.invalid_rows,
            errors=tuple(found.errors),
            errors_total=found.errors_total,
            warnings=tuple(found.warnings),
            warnings_total=found.warned.total(),
            first_tools_line=self._first_tools_line,
            file_code=self._file_code,
        )

    def _close_line(self) -> None:
        if self._rest and not self._skips_line:
            self._check_line(bytes(self._rest))
        if self._file_code is not None:
            return
        if self._array_line is not None:
            self._refuse_array(self._array_line)
        elif self._rows == 0:
            self._refuse("empty_file", "the file has no rows; write one JSON object on each line", line=1)

    def _open(self) -> None:
        head, self._head = bytes(self._head or b""), None
        packed = next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)
        if packed is not None:
            self._refuse("compressed_file", f"this is a {packed} file; unpack it and upload JSON lines", line=1)
        elif _is_wide_text(head):
            self._refuse("invalid_encoding", "line 1, byte 0: this is UTF-16 or UTF-32; save it as UTF-8", line=1)
        elif head.startswith(_BOM):
            self._offset = len(_BOM)
            self._split(head[len(_BOM) :])
        else:
            self._split(head)

    def _split(self, piece: bytes) -> None:
        start = 0
        while self._file_code is None and (end := piece.find(b"\n", start)) >= 0:
            self._end_line(piece[start:end])
            self._line += 1
            start = end + 1
        if self._file_code is not None:
            self._rest = bytearray()
        elif self._skips_line:
            self._offset += len(piece) - start
        elif len(self._rest) + len(piece) - start > MAX_LINE_BYTES:
            self._too_long(bytes(self._rest[:_BEGINNING_BYTES]) + piece[start : start + _BEGINNING_BYTES])
            self._skips_line = True
            self._offset += len(self._rest) + len(piece) - start
            self._rest = bytearray()
        else:
            self._rest += piece[start:]

    def _end_line(self, tail: bytes) -> None:
        size = len(self._rest) + len(tail)
        if self._skips_line:
            self._skips_line = False
        elif size > MAX_LINE_BYTES:
            self._too_long(bytes(self._rest[:_BEGINNING_BYTES]) + tail[:_BEGINNING_BYTES])
        else:
            self._check_line(bytes(self._rest) + tail if self._rest else tail)
        self._rest = bytearray()
        self._offset += size + 1

    def _too_long(self, beginning: bytes) -> None:
        if self._count_row():
            if self._rows == 1 and _ARRAY_BEGINS.match(beginning[:_BEGINNING_BYTES]):
                self._refuse_array(self._line)
                return
            message = f"the line is longer than {MAX_LINE_BYTES} bytes; split the row"
            self._found.add_invalid([RowError(self._line, 1, "", "line_too_long", message)])

    def _check_line(self, line: bytes) -> None:
        if not line.strip(_BLANK):
            self._found.warn_blank(self._line)
            return
        text = self._decode(line)
        if text is None or not self._count_row():
            return
        if _SURROGATE.search(text):
            self._found.add_invalid([_raw_surrogate(self._line, text)])
            return
        outcome = self._reader.read(text)
        may_be_array = self._rows == 1 and _ARRAY_BEGINS.match(line) is not None
        if isinstance(outcome, list):
            if may_be_array:
                self._refuse_array(self._line)
            else:
                self._found.add_invalid([_error_of(self._line, fault) for fault in outcome])
        elif isinstance(outcome[0], dict):
            self._check_object(text, cast(dict[str, object], outcome[0]), outcome[1])
        elif may_be_array:
            self._array_line = self._line
        else:
            self._found.add_invalid([_not_an_object(self._line)])

    def _check_object(self, text: str, row: dict[str, object], canonical: bytes) -> None:
        first = self._first_line_of.setdefault(hashlib.sha256(canonical).digest()[:16], self._line)
        if first != self._line:
            message = f"the same row as line {first}; it is kept"
            self._found.warn(RowError(self._line, 1, "", "duplicate_row", message))
        problems = check_row(row)
        own = format_of(row)
        self._format = self._format or own
        if own is not None and own != self._format and not self._is_mixed:
            self._is_mixed = True
            message = f"a {own} row in a {self._format} file; keep one format"
            problems.insert(0, Problem("mixed_formats", (), message))
        if problems:
            self._found.add(self._line, text, problems)
        if self._first_tools_line is None and row_uses_tools(row):
            self._first_tools_line = self._line

    def _decode(self, line: bytes) -> str | None:
        try:
            return line.decode()
        except UnicodeDecodeError:
            pass
        try:
            return line.decode(errors="surrogatepass")  # halves of pairs are a row's fault, not the file's
        except UnicodeDecodeError as wrong:
            place = f"line {self._line}, byte {self._offset + wrong.start}"
            column = len(line[: wrong.start].decode(errors="surrogatepass")) + 1
            self._refuse("invalid_encoding", f"{place}: not UTF-8; save the file as UTF-8", column=column)
            return None

    def _count_row(self) -> bool:
        if self._array_line is not None:
            self._found.add_invalid([_not_an_object(self._array_line)])
            self._array_line = None
        if self._rows == self._max_rows:
            self._refuse("too_many_rows", f"more than {self._max_rows} rows; split the file")
            return False
        self._rows += 1
        return True

    def _refuse_array(self, line: int) -> None:
        message = "the file is one JSON array; write each object on its own line, without brackets and commas"
        self._refuse("json_array_not_jsonl", message, line=line)

    def _refuse(self, code: str, message: str, *, line: int | None = None, column: int = 1) -> None:
        self._file_code = code
        self._found.put_first(RowError(line or self._line, column, "", code, message))


def _error_of(line: int, fault: Fault) -> RowError:
    return RowError(line, fault.position + 1, pointer(fault.path), fault.code, fault.message)


def _raw_surrogate(line: int, text: str) -> RowError:
    found = _SURROGATE.search(text)
    column = found.start() + 1 if found else 1
    return RowError(line, column, "", "lone_surrogate", "half of a surrogate pair stands here; write whole characters")


def _not_an_object(line: int) -> RowError:
    return RowError(line, 1, "", "not_an_object", 'a row must be one JSON object, such as {"messages": [...]}')


def _is_wide_text(head: bytes) -> bool:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    zeros = tuple(byte == 0 for byte in head[:4])
    return zeros in _WIDE_ZEROS

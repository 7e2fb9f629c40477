"""Reads a multipart form as it arrives: one part after another, each part's data in pieces.

A form holds one piece in memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.api.http.exception_handlers import ProtocolError
from app.core.errors import InvalidRequest

MAX_PARTS = 8
MAX_HEADER_BYTES = 16 * 1024


@dataclass(frozen=True)
class FormPart:
    """One part of a form; its data can be read once, before the next part."""

    name: str
    filename: str | None
    data: Iterator[bytes]


def boundary_of(content_type: str | None) -> bytes:
    """The boundary that a Content-Type names. Raises ProtocolError 415, InvalidRequest."""
    media_type, options = parse_options_header(content_type)
    if media_type != b"multipart/form-data":
        raise ProtocolError(415, "unsupported_media_type", "Send the file as multipart/form-data.")
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise malformed("its Content-Type names no boundary")
    return boundary


def read_parts(pieces: Iterable[bytes], boundary: bytes) -> Iterator[FormPart]:
    """The form's parts in order; what a consumer leaves unread of one is passed over. Raises InvalidRequest."""
    events = _events(pieces, boundary)
    for event in events:
        if isinstance(event, _Head):
            yield FormPart(event.name, event.filename, _data(events))


def malformed(why: str) -> InvalidRequest:
    """The answer to a form that cannot be read."""
    return InvalidRequest(f"The form cannot be read: {why}.", code="invalid_request_body")


_END = object()


@dataclass(frozen=True)
class _Head:
    name: str
    filename: str | None


class _Form:
    """Turns the parser's callbacks into a queue of heads, pieces of data, and ends."""

    def __init__(self, boundary: bytes) -> None:
        self.queue: list[object] = []
        self.is_complete = False
        self._parts = 0
        self._header_bytes = 0
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value = b"", b""
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._head,
                "on_part_data": lambda data, start, end: self.queue.append(data[start:end]),
                "on_part_end": lambda: self.queue.append(_END),
                "on_end": self._finish,
            },
            max_header_count=MAX_PARTS,
            max_header_size=MAX_HEADER_BYTES,
        )

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise malformed(f"it has more than {MAX_PARTS} parts")
        self._headers, self._header_bytes = {}, 0

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]
        self._count(end - start)

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._count(end - start)

    def _count(self, size_bytes: int) -> None:
        self._header_bytes += size_bytes
        if self._header_bytes > MAX_HEADER_BYTES:
            raise malformed(f"the headers of a part are longer than {MAX_HEADER_BYTES} bytes")

    def _header_end(self) -> None:
        self._headers[self._name.strip().lower()] = self._value.strip()
        self._name, self._value = b"", b""

    def _head(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition"))
        if disposition != b"form-data" or b"name" not in options:
            raise malformed("a part has no form name")
        if self._headers.get(b"content-type", b"").lower().startswith(b"multipart/"):
            raise malformed("a part is itself multipart")
        filename = options.get(b"filename")
        shown = None if filename is None else filename.decode("utf-8", "replace")
        self.queue.append(_Head(options[b"name"].decode("utf-8", "replace"), shown))

    def _finish(self) -> None:
        self.is_complete = True


def _events(pieces: Iterable[bytes], boundary: bytes) -> Iterator[object]:
    try:
        form = _Form(boundary)
        for piece in pieces:
            form.parser.write(piece)
            yield from form.queue
            form.queue.clear()
    except FormParserError:
        raise malformed("it does not follow the multipart format") from None
    if not form.is_complete:
        raise malformed("it ends before its last boundary")


def _data(events: Iterator[object]) -> Iterator[bytes]:
    for event in events:
        if event is _END:
            return
        yield cast(bytes, event)
    raise malformed("it ends inside a part")

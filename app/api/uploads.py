"""Receives one multipart upload: the file's bytes go to the blob store while they are hashed and scanned.

Knows multipart forms and the fields of an upload; must not know the database. Runs in a worker thread and pulls
the body from the event loop piece by piece, so a slow client fills no memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from anyio import from_thread
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.api.failures import ProtocolError
from app.api.wire.files import MAX_EXPIRY_SECONDS, MIN_EXPIRY_SECONDS
from app.core.blobs import Blob, BlobStore
from app.core.errors import InvalidRequest
from app.core.files import clean_filename
from app.core.settings import Limits
from app.core.tables import FilePurpose
from finetuning.spec.row_report import RowReport
from finetuning.spec.rows import RowScanner

MAX_PARTS = 8
MAX_HEADER_BYTES = 16 * 1024
MAX_FIELD_BYTES = 1024
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = {"purpose", _ANCHOR, _SECONDS}


@dataclass(frozen=True)
class Upload:
    """A received file: its stored bytes, what the scan found, and the fields that came with it."""

    blob: Blob
    report: RowReport
    filename: str
    expires_after_seconds: float | None


@dataclass(frozen=True)
class Part:
    """One part of a form; its data can be read once, before the next part."""

    name: str
    filename: str | None
    data: Iterator[bytes]


def receive_upload(request: Request, blobs: BlobStore, limits: Limits, key: str) -> Upload:
    """Read the whole form and store its file under `key`; nothing stays stored when it fails.

    Raises InvalidRequest, ProtocolError (408, 413), StorageFull.
    """
    boundary = _boundary(request)
    fields: dict[str, str] = {}
    stored: tuple[Blob, RowReport, str] | None = None
    try:
        for part in _parts(_pieces(request), boundary):
            if part.name in fields or (part.name == "file" and stored is not None):
                raise _malformed(f"the part {part.name!r} came twice")
            if part.name == "file":
                stored = _store(part, blobs, limits, key)
            elif part.name in _FIELDS:
                fields[part.name] = _text(part)
                _check_purpose(fields)
            else:
                raise InvalidRequest("Unknown form field.", code="unknown_parameter", param=part.name[:64])
        return _complete(fields, stored)
    except BaseException:
        if stored is not None:
            blobs.delete(key)
        raise


def _store(part: Part, blobs: BlobStore, limits: Limits, key: str) -> tuple[Blob, RowReport, str]:
    if part.filename is None:
        raise _malformed("the part 'file' has no filename")
    filename = clean_filename(part.filename)
    scanner = RowScanner(max_file_bytes=limits.file_bytes, max_rows=limits.rows_max)
    blob = blobs.put(key, _scanned(part.data, scanner, limits.file_bytes))
    return blob, scanner.close(), filename


def _scanned(data: Iterator[bytes], scanner: RowScanner, limit_bytes: int) -> Iterator[bytes]:
    size_bytes = 0
    for piece in data:
        size_bytes += len(piece)
        if size_bytes > limit_bytes:
            raise ProtocolError(413, "request_too_large", f"The file is larger than {limit_bytes} bytes.", param="file")
        scanner.feed(piece)
        yield piece


def _complete(fields: dict[str, str], stored: tuple[Blob, RowReport, str] | None) -> Upload:
    if stored is None:
        raise InvalidRequest("Send the file as the form part 'file'.", code="missing_required_parameter", param="file")
    if "purpose" not in fields:
        raise InvalidRequest("Send purpose=fine-tune.", code="missing_required_parameter", param="purpose")
    blob, report, filename = stored
    if blob.size_bytes == 0:
        raise InvalidRequest("The file is empty.", code="invalid_value", param="file")
    return Upload(blob, report, filename, _expiry_seconds(fields))


def _check_purpose(fields: dict[str, str]) -> None:
    purpose = fields.get("purpose", FilePurpose.FINE_TUNE)
    if purpose != FilePurpose.FINE_TUNE:
        raise InvalidRequest("The purpose must be fine-tune.", code="unsupported_purpose", param="purpose")


def _expiry_seconds(fields: dict[str, str]) -> float | None:
    anchor, seconds = fields.get(_ANCHOR), fields.get(_SECONDS)
    if anchor is None and seconds is None:
        return None
    for name, value in ((_ANCHOR, anchor), (_SECONDS, seconds)):
        if value is None:
            raise InvalidRequest(f"{name} is missing.", code="missing_required_parameter", param=name)
    if anchor != "created_at":
        raise InvalidRequest(f"{_ANCHOR} must be created_at.", code="invalid_value", param=_ANCHOR)
    text = seconds or ""
    is_number = text.isascii() and text.isdigit() and len(text) < 10
    if not is_number or not MIN_EXPIRY_SECONDS <= int(text) <= MAX_EXPIRY_SECONDS:
        message = f"{_SECONDS} must be an integer from {MIN_EXPIRY_SECONDS} to {MAX_EXPIRY_SECONDS}."
        raise InvalidRequest(message, code="invalid_value", param=_SECONDS)
    return float(text)


def _text(part: Part) -> str:
    data = b""
    for piece in part.data:
        data += piece
        if len(data) > MAX_FIELD_BYTES:
            raise InvalidRequest("The field is too long.", code="invalid_value", param=part.name)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest("The field is not UTF-8.", code="invalid_value", param=part.name) from None


def _boundary(request: Request) -> bytes:
    media_type, options = parse_options_header(request.headers.get("content-type"))
    if media_type != b"multipart/form-data":
        raise ProtocolError(415, "unsupported_media_type", "Send the file as multipart/form-data.")
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise _malformed("its Content-Type names no boundary")
    return boundary


def _pieces(request: Request) -> Iterator[bytes]:
    stream = aiter(request.stream())

    async def next_piece() -> bytes:
        return await anext(stream, b"")

    # the stream ends with an empty piece
    while piece := from_thread.run(next_piece):
        yield piece


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
            raise _malformed(f"it has more than {MAX_PARTS} parts")
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
            raise _malformed(f"the headers of a part are longer than {MAX_HEADER_BYTES} bytes")

    def _header_end(self) -> None:
        self._headers[self._name.strip().lower()] = self._value.strip()
        self._name, self._value = b"", b""

    def _head(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition"))
        if disposition != b"form-data" or b"name" not in options:
            raise _malformed("a part has no form name")
        if self._headers.get(b"content-type", b"").lower().startswith(b"multipart/"):
            raise _malformed("a part is itself multipart")
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
        raise _malformed("it does not follow the multipart format") from None
    if not form.is_complete:
        raise _malformed("it ends before its last boundary")


def _parts(pieces: Iterable[bytes], boundary: bytes) -> Iterator[Part]:
    events = _events(pieces, boundary)
    for event in events:
        # whatever a consumer left unread of the part before is passed over
        if isinstance(event, _Head):
            yield Part(event.name, event.filename, _data(events))


def _data(events: Iterator[object]) -> Iterator[bytes]:
    for event in events:
        if event is _END:
            return
        yield cast(bytes, event)
    raise _malformed("it ends inside a part")


def _malformed(why: str) -> InvalidRequest:
    return InvalidRequest(f"The form cannot be read: {why}.", code="invalid_request_body")

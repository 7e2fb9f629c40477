"""Receives one multipart upload: the file's bytes go to the blob store while they are hashed and scanned.

Runs in a worker thread and pulls the body from the event loop piece by piece, so a slow client fills no memory. Must
not know the database: nothing of a file stands there before all its bytes are stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from anyio import from_thread
from fastapi import Request

from app.api.http.exception_handlers import ProtocolError
from app.api.http.multipart import FormPart, boundary_of, malformed, read_parts
from app.api.http.resources import Resources
from app.api.schemas.files import MAX_EXPIRY_SECONDS, MIN_EXPIRY_SECONDS
from app.core.errors import InvalidRequest
from app.core.files import clean_filename
from app.core.storage.blobs import Blob
from app.core.storage.tables import FilePurpose
from finetuning.rows.report import RowReport
from finetuning.rows.scanner import RowScanner

MAX_FIELD_BYTES = 1024
# each piece is handed from the event loop to this thread, so many small ones would cost more than their bytes
_PIECE_BYTES = 2**18
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = {"purpose", _ANCHOR, _SECONDS}


@dataclass(frozen=True)
class Upload:
    """A received file: its stored bytes, what the scan found, and the fields that came with it."""

    blob: Blob
    report: RowReport
    report_text: str
    filename: str
    expires_after_seconds: float | None


def receive_upload(request: Request, resources: Resources, key: str) -> Upload:
    """Read the whole form and store its file under `key`; nothing stays stored when it fails.

    Raises InvalidRequest, ProtocolError (408, 413), StorageFull.
    """
    boundary = boundary_of(request.headers.get("content-type"))
    fields: dict[str, str] = {}
    stored: tuple[Blob, RowReport, str] | None = None
    try:
        for part in read_parts(_pieces(request), boundary):
            if part.name in fields or (part.name == "file" and stored is not None):
                raise malformed(f"the part {part.name!r} came twice")
            if part.name == "file":
                stored = _store(part, resources, key)
            elif part.name in _FIELDS:
                fields[part.name] = _text(part)
                _check_purpose(fields)
            else:
                raise InvalidRequest("Unknown form field.", code="unknown_parameter", param=part.name[:64])
        return _complete(fields, stored)
    except BaseException:
        if stored is not None:
            resources.blobs.delete(key)
        raise


def _store(part: FormPart, resources: Resources, key: str) -> tuple[Blob, RowReport, str]:
    limits = resources.settings.limits
    if part.filename is None:
        raise malformed("the part 'file' has no filename")
    filename = clean_filename(part.filename)
    scanner = RowScanner(max_file_bytes=limits.file_bytes, max_rows=limits.rows_max, max_seconds=limits.check_seconds)
    blob = resources.blobs.put(key, _scanned(part.data, scanner, resources))
    with resources.turn:
        return blob, scanner.close(), filename


def _scanned(data: Iterator[bytes], scanner: RowScanner, resources: Resources) -> Iterator[bytes]:
    size_bytes, limit_bytes = 0, resources.settings.limits.file_bytes
    for piece in data:
        size_bytes += len(piece)
        if size_bytes > limit_bytes:
            raise ProtocolError(413, "request_too_large", f"The file is larger than {limit_bytes} bytes.", param="file")
        with resources.turn:  # piece by piece: whoever checks a large file lets others in between
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
    return Upload(blob, report, report.to_text(), filename, _expiry_seconds(fields))


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


def _text(part: FormPart) -> str:
    data = b""
    for piece in part.data:
        data += piece
        if len(data) > MAX_FIELD_BYTES:
            raise InvalidRequest("The field is too long.", code="invalid_value", param=part.name)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest("The field is not UTF-8.", code="invalid_value", param=part.name) from None


def _pieces(request: Request) -> Iterator[bytes]:
    stream = aiter(request.stream())

    async def next_piece() -> bytes:
        piece = bytearray()
        async for received in stream:
            piece += received
            if len(piece) >= _PIECE_BYTES:
                break
        return bytes(piece)

    while piece := from_thread.run(next_piece):
        yield piece

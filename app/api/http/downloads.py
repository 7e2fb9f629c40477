"""Downloads: a blob as an HTTP reply with a strong ETag, ranges and conditions (RFC 9110).

Must not know who may have the bytes: the route has asked before.
"""

import base64
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from app.api.http.exception_handlers import ProtocolError
from app.api.schemas.files import strong_etag
from app.core.storage.blobs import BlobStore

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class Download:
    """Bytes of a known size and digest, and the name and type under which they leave."""

    size_bytes: int
    sha256: str
    filename: str
    media_type: str = "application/octet-stream"

    @property
    def etag(self) -> str:
        """The strong entity tag."""
        return strong_etag(self.sha256)


@dataclass(frozen=True)
class Span:
    """The bytes [start, end) of a download."""

    start: int
    end: int


def send_blob(request: Request, blobs: BlobStore, key: str, download: Download) -> Response:
    """Answer a GET or HEAD from the blob store. Raises ProtocolError 416, BlobMissing."""
    return _send(request, download, lambda span: blobs.read(key, start=span.start, end=span.end))


def send_bytes(request: Request, data: bytes, download: Download) -> Response:
    """Answer a GET or HEAD from memory. Raises ProtocolError 416."""
    return _send(request, download, lambda span: iter([data[span.start : span.end]]))


def matches_etag(request: Request, etag: str) -> bool:
    """Whether If-None-Match names this representation, so that 304 is the answer."""
    sent = request.headers.get("if-none-match")
    if sent is None:
        return False
    return sent.strip() == "*" or any(tag.strip().removeprefix("W/") == etag for tag in sent.split(","))


def not_modified(etag: str) -> Response:
    """The 304 for this representation."""
    return Response(status_code=304, headers={"ETag": etag})


def parse_range(value: str | None, size_bytes: int) -> Span | None:
    """The one satisfiable byte range that a Range header asks for; None: send everything.

    Several ranges, a reversed one and other units are ignored, as RFC 9110 allows. Raises ProtocolError 416.
    """
    match = _RANGE.fullmatch((value or "").strip().replace(" ", ""))
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        length = min(_number(match[2]), size_bytes)
        span = Span(size_bytes - length, size_bytes)
    else:
        start, last = _number(match[1]), _number(match[2] or str(size_bytes))
        if last < start < size_bytes:
            return None
        span = Span(start, min(last + 1, size_bytes))
    if span.start >= span.end:
        headers = {"Content-Range": f"bytes */{size_bytes}"}
        message = f"The range lies outside of the {size_bytes} bytes."
        raise ProtocolError(416, "range_not_satisfiable", message, headers=headers)
    return span


def _send(request: Request, download: Download, read: Callable[[Span], Iterator[bytes]]) -> Response:
    if matches_etag(request, download.etag):
        return not_modified(download.etag)
    headers = _headers(download)
    if_range = request.headers.get("if-range")
    # If-Range with another tag, or with a date, asks for the whole
    span = parse_range(request.headers.get("range"), download.size_bytes) if if_range in (None, download.etag) else None
    if span is not None:
        headers["Content-Range"] = f"bytes {span.start}-{span.end - 1}/{download.size_bytes}"
    status, part = (200, Span(0, download.size_bytes)) if span is None else (206, span)
    headers["Content-Length"] = str(part.end - part.start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=download.media_type)
    return StreamingResponse(read(part), status_code=status, headers=headers, media_type=download.media_type)


def _headers(download: Download) -> dict[str, str]:
    digest = base64.b64encode(bytes.fromhex(download.sha256)).decode()
    plain, encoded = re.sub(r"[^A-Za-z0-9 ._()+=,@-]", "_", download.filename), quote(download.filename, safe="")
    return {
        "ETag": download.etag,
        "Accept-Ranges": "bytes",
        "Repr-Digest": f"sha-256=:{digest}:",
        "Content-Disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{encoded}",
    }


def _number(digits: str) -> int:
    # 19 digits are past any file, and more would take long to convert
    return int(digits[:19])

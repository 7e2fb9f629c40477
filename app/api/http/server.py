"""The web server below the API: what one connection may take before there is a request, and its answer to bad HTTP.

A proxy in front should have the same limits (docs/getting-started/operator.md); these hold where there is none.
"""

import asyncio
import ctypes
import gc
import json
import resource
import sys
from collections import Counter
from contextlib import suppress
from typing import Any, cast

import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.api.http.exception_handlers import ProtocolError, error_body
from app.core.errors import ImmunotuneError, ServiceBusy
from app.core.ids import Prefix, new_id
from app.core.settings import EdgeSettings, Settings

DRAIN_SECONDS, DRAIN_BYTES = 2.0, 4 * 2**20
SHUTDOWN_SECONDS = 30
_MOST_FILES = 65_536
_M_ARENA_MAX = -8  # malloc.h
# a thread that computes lets the event loop in after this: a request crosses the loop some ten times
_SWITCH_SECONDS = 0.001

_log = structlog.get_logger(__name__)


def make_server(app: ASGIApp, settings: Settings) -> uvicorn.Server:
    """A server for the app, not yet running, that keeps to `settings.edge`."""
    edge, open_from = settings.edge, Counter[str]()

    def protocol(**options: Any) -> asyncio.Protocol:  # Any: uvicorn's own arguments
        return _GuardedProtocol(edge, open_from, **options)

    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=cast(type[asyncio.Protocol], protocol),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(edge.trusted_proxies),
        forwarded_allow_ips=list(edge.trusted_proxies),
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)


def serve(app: ASGIApp, settings: Settings) -> None:
    """Serve the app until a signal comes."""
    _allow_many_files()
    _keep_few_arenas()
    sys.setswitchinterval(_SWITCH_SECONDS)
    # what is loaded by now stays: a full collection, which stops every thread, need not look at it again
    gc.collect()
    gc.freeze()
    make_server(app, settings).run()


def _allow_many_files() -> None:
    """Raise this process's own limit of open files as far as it may: each connection takes one or two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _keep_few_arenas() -> None:
    """Let all threads share two heaps of glibc: with one each, what a large body leaves in one helps no other."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


class _GuardedProtocol(HttpToolsProtocol):
    """One connection: bounded in the size and the number of its headers and in the time that they take."""

    def __init__(self, edge: EdgeSettings, open_from: Counter[str], **options: Any) -> None:
        super().__init__(**options)
        self._edge, self._open_from = edge, open_from
        self._fault: ImmunotuneError | None = None
        self._is_refused = False
        self._head_bytes = self._header_count = self._silent_bytes = self._drained_bytes = 0
        self._has_progress = False
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        address = self._address()
        self._open_from[address] += 1
        if self._open_from[address] > self._edge.connections_per_address:
            self._refuse(ServiceBusy("Too many connections from this address. Close some.", retry_after=5.0))
        elif self._open_from.total() > self._edge.connections:
            self._refuse(ServiceBusy("The server has too many connections. Retry in a few seconds.", retry_after=5.0))
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        address = self._address()
        self._open_from[address] -= 1
        if not self._open_from[address]:
            del self._open_from[address]
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            self._drained_bytes += len(data)  # read on and forget, so that the answer is not lost with the connection
            if self._drained_bytes > DRAIN_BYTES:
                self.transport.abort()
            return
        self._has_progress = False
        super().data_received(data)
        if self._is_refused or self.transport.is_closing():
            return
        # the parser gathers a header until it is whole, however long it gets
        self._silent_bytes = 0 if self._has_progress else self._silent_bytes + len(data)
        if self._silent_bytes > self._edge.header_bytes:
            self._refuse(_headers_too_large(self._edge))
        elif self._head_timer is None and self._is_idle():
            self._await_head()  # bytes came that finish no request: a new head, blank lines, a body nobody reads

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  (the text that ours replaces)
        """What uvicorn calls when the parser gives up or one of our callbacks refused."""
        self._refuse(self._fault or ProtocolError(400, "invalid_request_body", "The request is not valid HTTP/1.1."))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = self._header_count = 0
        self._has_progress = True

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_count += 1
        self._count(len(name) + len(value) + 4)  # with the colon, the space and the line's end
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._has_progress = True
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._has_progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._has_progress = True
        super().on_message_complete()

    def _count(self, size_bytes: int) -> None:
        self._has_progress = True
        self._head_bytes += size_bytes
        if self._head_bytes > self._edge.header_bytes or self._header_count > self._edge.headers:
            self._fault = _headers_too_large(self._edge)
            raise self._fault

    def _address(self) -> str:
        return self.client[0] if self.client else ""

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._edge.header_seconds, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            _log.info("connection.silent", address=self._address())
            self.transport.close()

    def _refuse(self, error: ImmunotuneError) -> None:
        """Answer with the error and end the connection; an answer that has begun is left alone or broken off."""
        self._is_refused = True
        self._stop_timer()
        _log.info("connection.refused", code=error.code, status=error.status, address=self._address())
        if self.cycle is not None and not self.cycle.response_complete:
            if not self.cycle.more_body:  # what is refused came behind a whole request, whose answer is under way
                self.cycle.keep_alive = False
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.close()
                return
        self.transport.write(_raw_answer(error))
        # closing at once would reset the connection under bytes that still come, and the answer might never be read
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(DRAIN_SECONDS, self.transport.abort)


def _headers_too_large(edge: EdgeSettings) -> ProtocolError:
    message = f"The headers are longer than {edge.header_bytes} bytes, or more than {edge.headers}. Send fewer."
    return ProtocolError(431, "headers_too_large", message)


def _raw_answer(error: ImmunotuneError) -> bytes:
    body = json.dumps(error_body(error)).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-request-id": new_id(Prefix.REQUEST),
        "cache-control": "no-store",
        "x-content-type-options": "nosniff",
        "connection": "close",
    }
    if error.retry_after is not None:
        headers["retry-after"] = str(round(error.retry_after))
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return STATUS_LINE[error.status] + lines.encode("ascii") + b"\r\n" + body

"""What happens to every request before and after its handler: id, limits, raw-path routing, headers, access log.

Plain ASGI, so that streams pass through unbuffered.
"""

import time
from collections.abc import Collection, Mapping
from typing import Any

import anyio
import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.http.exception_handlers import ProtocolError, crash_response, error_response
from app.api.http.paging import check_query
from app.core.errors import ImmunotuneError, InvalidRequest
from app.core.ids import Prefix, new_id
from app.core.settings import EdgeSettings, LimitSettings, Settings

MAX_URL_BYTES = 8 * 1024
UPLOADS = "/v1/files"
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_HEALTH = ("/healthz", "/readyz")  # probes know an address at best
# boundary lines, part headers and the small fields of a multipart upload
_MULTIPART_OVERHEAD_BYTES = 128 * 1024

_log = structlog.get_logger(__name__)


class RequestLog:
    """Outermost layer: request id, headers of the reply, one access line, and the answer to a crash."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, started, status = new_id(Prefix.REQUEST), time.monotonic(), 0
        state = scope.setdefault("state", {})
        structlog.contextvars.bind_contextvars(request_id=request_id)

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(MutableHeaders(scope=message), request_id, started, state)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            _log.info("request.abandoned", method=scope["method"])
        except Exception:
            _log.exception("request.crashed", method=scope["method"])
            if status:  # the reply has begun: all that is left is to break it off
                raise
            await crash_response()(scope, receive, send_with_headers)
        finally:
            elapsed_ms = round((time.monotonic() - started) * 1000)
            # the path without its query: a key may stand there by mistake
            _log.info("request", method=scope["method"], path=scope["path"][:200], status=status, ms=elapsed_ms)
            structlog.contextvars.unbind_contextvars("request_id")


class RequestGuard:
    """Refuses what no handler should see, and routes on the raw path.

    The path parameter of a handler is one undecoded segment: `org%2Fname` stays one segment until it is looked up.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._limits, self._edge, self._hosts = settings.limits, settings.edge, _allowed_hosts(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope.get("raw_path") or scope["path"].encode("utf-8")
        scope["path"] = _routable(path.partition(b"?")[0].decode("latin-1"))
        try:
            limit_bytes = body_limit(scope["path"], self._limits)
            headers = Headers(scope=scope)
            _check_host(scope["path"], headers.get("host", ""), self._hosts)
            _check_headers(scope, headers, limit_bytes)
        except ImmunotuneError as error:
            await error_response(error)(scope, receive, send)
            return
        pace = Pace(self._edge, self._edge.upload_seconds if scope["path"] == UPLOADS else self._edge.body_seconds)
        await self._app(scope, _limited(receive, limit_bytes, pace), send)


def body_limit(path: str, limits: LimitSettings) -> int:
    """How many bytes a request to this path may have."""
    match path:
        case path if path == UPLOADS:
            return limits.file_bytes + _MULTIPART_OVERHEAD_BYTES
        case "/v1/chat/completions" | "/v1/completions":
            return limits.chat_body_bytes
        case _:
            return limits.json_body_bytes


def _allowed_hosts(settings: Settings) -> frozenset[str] | None:
    """The names that a request may address us by; None where the operator left it open on an address of a network."""
    if settings.edge.allowed_hosts:
        return frozenset(name.lower() for name in settings.edge.allowed_hosts)
    return _LOOPBACK if settings.host.lower() in _LOOPBACK else None


def _check_host(path: str, host: str, allowed: Collection[str] | None) -> None:
    # a page of somebody's else, whose name was made to resolve to us, cannot send our name
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if allowed is not None and name.strip("[]").lower() not in allowed and path not in _HEALTH:
        message = "This server is not known by that Host. Operators list its names in IMMUNOTUNE_EDGE__ALLOWED_HOSTS."
        raise InvalidRequest(message, code="invalid_value", param="host")


def _routable(path: str) -> str:
    return path[:-1] if len(path) > 1 and path.endswith("/") else path


def _check_headers(scope: Scope, headers: Headers, limit_bytes: int) -> None:
    if len(scope["path"]) + len(scope["query_string"]) > MAX_URL_BYTES:
        raise ProtocolError(431, "headers_too_large", f"The URL is longer than {MAX_URL_BYTES} bytes.")
    check_query(scope["query_string"])
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ProtocolError(415, "unsupported_media_type", "Send the request body without Content-Encoding.")
    if len(headers.getlist("authorization")) > 1:
        raise ProtocolError(400, "invalid_value", "Send one Authorization header.", param="authorization")
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise ProtocolError(400, "invalid_request_body", "Content-Length is not a number.")
    if int(length[:20]) > limit_bytes:
        raise _too_large(limit_bytes)


def _too_large(limit_bytes: int) -> ProtocolError:
    return ProtocolError(413, "request_too_large", f"The request body is larger than {limit_bytes} bytes.")


class Pace:
    """How slowly a body may come: so many bytes over each window of waiting, and so much waiting in all.

    Only waiting for the client counts, not what we do with its bytes.
    """

    def __init__(self, edge: EdgeSettings, seconds: float) -> None:
        self._edge, self._seconds_left = edge, seconds
        self._window_left, self._window_bytes = edge.window_seconds, 0

    async def wait(self, receive: Receive) -> Message:
        """The next message. Raises ProtocolError 408."""
        started = time.monotonic()
        try:
            with anyio.fail_after(min(self._window_left, self._seconds_left)):
                message = await receive()
        except TimeoutError:
            raise _too_slow(may_retry=self._window_left < self._seconds_left) from None
        waited = time.monotonic() - started
        self._seconds_left -= waited
        self._window_left -= waited
        self._window_bytes += len(message.get("body", b""))
        if self._window_bytes >= self._edge.bytes_per_second * self._edge.window_seconds:
            self._window_left, self._window_bytes = self._edge.window_seconds, 0
        return message


def _too_slow(*, may_retry: bool) -> ProtocolError:
    advice = "The request body comes too slowly, or stopped. Send it again."
    if not may_retry:  # over this line it would take as long once more
        advice = "The request body took longer in all than it may. Send less, or over a faster line."
    steer = {} if may_retry else {"x-should-retry": "false"}
    return ProtocolError(408, "request_timeout", advice, headers={"Connection": "close", **steer})


def _limited(receive: Receive, limit_bytes: int, pace: Pace) -> Receive:
    """`receive` that fails at the byte over the limit, and when the client is too slow."""
    # Starlette's own limit answers a too large Content-Length in plain text, outside of the error envelope
    size_bytes, complete = 0, False

    async def receive_within() -> Message:
        nonlocal size_bytes, complete
        if complete:  # only a disconnect can follow, and a stream may wait for it as long as it likes
            return await receive()
        message = await pace.wait(receive)
        size_bytes += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if size_bytes > limit_bytes:
            raise _too_large(limit_bytes)
        return message

    return receive_within


def _add_headers(headers: MutableHeaders, request_id: str, started: float, state: Mapping[str, Any]) -> None:
    headers["x-request-id"] = request_id
    headers["openai-processing-ms"] = str(round((time.monotonic() - started) * 1000))
    if state.get("org"):
        headers["openai-organization"] = state["org"]
    headers.update(state.get("rates", {}))
    headers.setdefault("Cache-Control", "no-store")
    headers["X-Content-Type-Options"] = "nosniff"

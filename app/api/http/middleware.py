"""What happens to every request before and after its handler: id, limits, raw-path routing, headers, access log.

Plain ASGI, so that streams pass through unbuffered.
"""

import time

import anyio
import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.http.exception_handlers import ProtocolError, crash_response, error_response
from app.api.http.paging import check_query
from app.core.errors import ImmunotuneError
from app.core.ids import Prefix, new_id
from app.core.settings import LimitSettings

MAX_URL_BYTES = 8 * 1024
BODY_IDLE_SECONDS = 30.0
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
                _add_headers(MutableHeaders(scope=message), request_id, started, state.get("org"))
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

    def __init__(self, app: ASGIApp, limits: LimitSettings) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope.get("raw_path") or scope["path"].encode("utf-8")
        scope["path"] = _routable(path.partition(b"?")[0].decode("latin-1"))
        try:
            limit_bytes = self._body_limit(scope)
            _check_headers(scope, Headers(scope=scope), limit_bytes)
        except ImmunotuneError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, _limited(receive, limit_bytes), send)

    def _body_limit(self, scope: Scope) -> int:
        match scope["path"]:
            case "/v1/files":
                return self._limits.file_bytes + _MULTIPART_OVERHEAD_BYTES
            case "/v1/chat/completions" | "/v1/completions":
                return self._limits.chat_body_bytes
            case _:
                return self._limits.json_body_bytes


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


def _limited(receive: Receive, limit_bytes: int) -> Receive:
    """`receive` that fails at the byte over the limit, and when the client stops sending before the body ends."""
    # Starlette's own limit answers a too large Content-Length in plain text, outside of the error envelope
    size_bytes, complete = 0, False

    async def receive_within() -> Message:
        nonlocal size_bytes, complete
        if complete:  # only a disconnect can follow, and a stream may wait for it as long as it likes
            return await receive()
        try:
            with anyio.fail_after(BODY_IDLE_SECONDS):
                message = await receive()
        except TimeoutError:
            advice = "The request body stopped arriving. Send it again."
            raise ProtocolError(408, "request_timeout", advice, headers={"Connection": "close"}) from None
        size_bytes += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if size_bytes > limit_bytes:
            raise _too_large(limit_bytes)
        return message

    return receive_within


def _add_headers(headers: MutableHeaders, request_id: str, started: float, org: str | None) -> None:
    headers["x-request-id"] = request_id
    headers["openai-processing-ms"] = str(round((time.monotonic() - started) * 1000))
    if org:
        headers["openai-organization"] = org
    headers.setdefault("Cache-Control", "no-store")
    headers["X-Content-Type-Options"] = "nosniff"

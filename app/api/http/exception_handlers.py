"""Every way a request can fail, answered in the API's one error envelope.

An unknown exception becomes a 500 that names nothing but the request id.
"""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from math import ceil
from urllib.parse import unquote

import structlog
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route

from app.core.errors import ImmunotuneError, RateLimited, ServiceBusy
from app.core.storage.blobs.store import storage_full
from app.core.storage.database import DATABASE_DOWN, has_no_room

_log = structlog.get_logger(__name__)


class ProtocolError(ImmunotuneError):
    """The HTTP exchange itself is at fault: method, size, media type, range."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.status = status
        self.headers = dict(headers or {})


def error_body(error: ImmunotuneError) -> dict[str, object]:
    """The error envelope; `details` only where the error has some."""
    body: dict[str, object] = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    if error.details is not None:
        body["details"] = dict(error.details)
    return {"error": body}


def error_response(error: ImmunotuneError) -> JSONResponse:
    """Status, envelope and the headers that steer a client's retry."""
    headers = dict(getattr(error, "headers", {}))
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, ceil(error.retry_after)))
        if isinstance(error, RateLimited):
            headers["retry-after-ms"] = str(max(1, ceil(error.retry_after * 1000)))
    if error.type == "insufficient_quota" or error.status == HTTPStatus.INSUFFICIENT_STORAGE:
        headers["x-should-retry"] = "false"
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


def crash_response() -> JSONResponse:
    """The answer to a fault of ours; the log has the trace under the same request id."""
    return error_response(
        _Crash("The server failed to answer. Retry; if it stays, tell the operator the x-request-id of this reply.")
    )


def install(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Make every exception of every path an envelope. `routers` tell which methods a path has."""
    routes = [route for router in routers for route in router.routes if isinstance(route, Route)]

    def known(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ImmunotuneError)
        return error_response(error)

    def protocol(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return error_response(_from_http(request, error, routes))

    def malformed(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(_from_validation(error))

    def database_down(_request: Request, error: Exception) -> JSONResponse:
        if has_no_room(error):
            _log.error("database.full")
            return error_response(storage_full())
        _log.error("database.down", reason=type(error).__name__)
        return error_response(ServiceBusy("The database does not answer. Retry in a few seconds.", retry_after=5.0))

    app.add_exception_handler(ImmunotuneError, known)
    for kind in DATABASE_DOWN:
        app.add_exception_handler(kind, database_down)
    app.add_exception_handler(HTTPException, protocol)
    app.add_exception_handler(RequestValidationError, malformed)


class _Crash(ImmunotuneError):
    type = "server_error"


def _from_http(request: Request, error: HTTPException, routes: list[Route]) -> ImmunotuneError:
    path = request.scope["path"]
    if error.status_code == HTTPStatus.NOT_FOUND:
        return ProtocolError(404, "unknown_url", _unknown_url(request.method, path))
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = sorted({m for route in routes if route.path_regex.match(path) for m in route.methods or ()})
        message = f"{request.method} is not allowed here. Allowed: {', '.join(allowed)}."
        return ProtocolError(405, "method_not_allowed", message, headers={"Allow": ", ".join(allowed)})
    if error.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return ProtocolError(413, "request_too_large", "The request body is too large. Send less.")
    _log.error("http.unexpected", status=error.status_code)
    return ProtocolError(400, "invalid_request_body", "The request could not be read. Check its body and headers.")


def _unknown_url(method: str, path: str) -> str:
    shown = unquote(path)[:200]
    hint = "See the API reference for the routes there are."
    if not path.startswith("/v1/") and path != "/v1":
        hint = f"API routes begin with /v1: set the client's base_url to end in /v1 (did you mean /v1{shown}?)."
    for word, advice in _OUT_OF_SCOPE.items():
        if path.startswith(f"/v1/{word}"):
            hint = advice
    return f"Unknown request URL: {method} {shown}. {hint}"


_OUT_OF_SCOPE = {
    "responses": "Use POST /v1/chat/completions.",
    "embeddings": "Models here are causal adapters; there are no embeddings.",
    "batches": "Send the requests one by one to POST /v1/chat/completions.",
    "moderations": "A job's row verdicts (GET /v1/fine_tuning/jobs/{id}/rows) tell which rows are harmful.",
}


def _from_validation(error: RequestValidationError) -> ImmunotuneError:
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part not in {"query", "path", "header", "body"}) or None
    return ProtocolError(400, "invalid_value", f"{param or 'request'}: {first['msg']}.", param=param)

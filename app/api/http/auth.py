"""Who asks: the bearer key of a request becomes a Caller, who must hold the route's scope."""

import hashlib
from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Request

from app.api.http.rates import Standing, rate_headers
from app.api.http.resources import ResourcesDep
from app.core import projects
from app.core.errors import Forbidden, InvalidApiKey, RateLimited
from app.core.projects import Caller


def get_caller(request: Request, resources: ResourcesDep) -> Caller:
    """Authenticate. Raises InvalidApiKey `invalid_api_key` or `mismatched_project`, RateLimited."""
    if "api_key" in request.query_params:
        raise InvalidApiKey("An API key in a URL ends up in logs. Revoke it, and send keys as a bearer token.")
    secret, address = _bearer(request), request.client.host if request.client else ""
    key = hashlib.blake2b(secret.encode("utf-8", "surrogateescape"), key=resources.pepper).digest()
    try:
        with resources.database.reading() as session:
            caller = projects.authenticate(session, resources.pepper, secret)
    except InvalidApiKey:
        resources.rates.note_wrong_key(address)
        raise
    _check_rate(request, resources.rates.requests.take(key))
    _check_tenant(request, caller)
    request.state.org, request.state.project = caller.org.id, caller.project_id
    return caller


def caller_with(scope: str | None = None) -> Callable[..., Caller]:
    """A dependency: the caller, who must hold `scope`. Raises Forbidden `insufficient_scope`."""

    def check(caller: Annotated[Caller, Depends(get_caller)]) -> Caller:
        if scope is not None:
            require_scope(caller, scope)
        return caller

    return check


def require_scope(caller: Caller, scope: str) -> None:
    """Raises Forbidden `insufficient_scope` unless the caller's key has the scope."""
    if scope not in caller.scopes:
        raise Forbidden(f"This key lacks the scope {scope}. Ask for a key that has it.", code="insufficient_scope")


AnyCaller = Annotated[Caller, Depends(caller_with())]
FilesReader = Annotated[Caller, Depends(caller_with("files:r"))]
FilesWriter = Annotated[Caller, Depends(caller_with("files:w"))]
JobsReader = Annotated[Caller, Depends(caller_with("jobs:r"))]
JobsWriter = Annotated[Caller, Depends(caller_with("jobs:w"))]
ModelsUser = Annotated[Caller, Depends(caller_with("models:infer"))]
ModelsWriter = Annotated[Caller, Depends(caller_with("models:w"))]
ArtifactsReader = Annotated[Caller, Depends(caller_with("artifacts:r"))]
SafetyReader = Annotated[Caller, Depends(caller_with("safety:r"))]


def _check_rate(request: Request, standing: Standing) -> None:
    request.state.rates = rate_headers("requests", standing)
    if standing.wait_seconds:
        raise RateLimited(f"More than {standing.limit} requests a minute. Send fewer.", standing.wait_seconds)


def _bearer(request: Request) -> str:
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise InvalidApiKey("No API key came with the request. Send the header Authorization: Bearer KEY.")
    return secret.strip()


def _check_tenant(request: Request, caller: Caller) -> None:
    for header, own in (("openai-organization", caller.org.id), ("openai-project", caller.project_id)):
        sent = request.headers.get(header)
        if sent and sent != own:
            raise InvalidApiKey(
                f"The key does not belong to the {header} that was sent. Leave the header out.",
                code="mismatched_project",
            )

"""Every error that may reach a client, as one tree.

ImmunotuneError             code, status, param, message (what to do next), optional details, optional retry_after
├── InvalidRequest     400  the caller can fix the request
├── InvalidApiKey      401
├── Forbidden          403  the caller's own thing, not allowed
├── NotFound           404  absent or somebody else's: the same answer
├── RequestInProgress  409
├── QuotaExceeded      429  retrying does not help
├── RateLimited        429  too often: wait, then retry
├── ServiceBusy        503  nothing was done; retry later
│   └── StoreDown           the blob store does not answer, or not as it should
└── StorageFull        507
StartRefused                never reaches a client: the process does not start, and says what the operator can do
LeaseLost                   never reaches a client: the attempt must stop and leave no trace
"""

from collections.abc import Mapping


class ImmunotuneError(Exception):
    """An error with a machine-readable code and a message that says what to do next."""

    status = 500
    code = "internal_error"
    type = "invalid_request_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        details: Mapping[str, object] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.details = details
        self.retry_after = retry_after


class InvalidRequest(ImmunotuneError):
    """The request cannot be met as sent; `code` says which rule it breaks."""

    status = 400
    code = "invalid_value"


class InvalidApiKey(ImmunotuneError):
    """No key, a wrong one, or a revoked one."""

    status = 401
    code = "invalid_api_key"


class Forbidden(ImmunotuneError):
    """The thing is the caller's own, but this may not be done with it."""

    status = 403
    code = "insufficient_scope"


class NotFound(ImmunotuneError):
    """Absent, deleted or another project's: one answer for all three."""

    status = 404
    code = "not_found"


class RequestInProgress(ImmunotuneError):
    """The same request is still being answered."""

    status = 409
    code = "request_in_progress"


class QuotaExceeded(ImmunotuneError):
    """A cap of the project is reached; retrying alone does not help."""

    status = 429
    code = "insufficient_quota"
    type = "insufficient_quota"


class RateLimited(ImmunotuneError):
    """Too often, or too many at once; `type` says of what: requests or tokens."""

    status = 429
    code = "rate_limit_exceeded"
    type = "requests"

    def __init__(self, message: str, wait_seconds: float, *, of: str = "requests") -> None:
        super().__init__(message, retry_after=min(60.0, wait_seconds))
        self.type = of


class ServiceBusy(ImmunotuneError):
    """Nothing was done; the same request may succeed after `retry_after` seconds."""

    status = 503
    code = "overloaded"
    type = "server_error"


class StoreDown(ServiceBusy):
    """The blob store does not answer, refuses us, or breaks off; no fault of the request or of the job."""

    code = "storage_unavailable"


class StorageFull(ImmunotuneError):
    """The blob store has no room left."""

    status = 507
    code = "storage_full"
    type = "server_error"


class StartRefused(RuntimeError):
    """A process disagrees with its deployment (store, pepper, key, base) and must not start; the message says what to
    do."""


class LeaseLost(Exception):
    """Another attempt, a cancel or the reaper took the job: stop, drop the scratch folder, acknowledge."""


def not_found(what: str, value: str) -> NotFound:
    """The answer to an absent and to a foreign id; `what` is a word such as "file"."""
    return NotFound(f"No {what} with id '{value[:80]}' in this project. List them to see the ids you can use.")


def invalid_cursor() -> InvalidRequest:
    """The answer to a cursor that is unknown, foreign, or of another list."""
    return InvalidRequest(
        "The cursor 'after' is not the id of an item of this list. "
        "Pass the last id of the page before, or leave it out.",
        code="invalid_cursor",
        param="after",
    )


def model_not_found(model: str) -> NotFound:
    """The answer to any model name that this project cannot use."""
    return NotFound(
        f"The model '{model[:120]}' does not exist or is not yours. GET /v1/models lists the names you can use.",
        code="model_not_found",
        param="model",
    )

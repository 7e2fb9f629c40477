"""Strict JSON request bodies: one meaning per byte string, or 400 with the place of the fault."""

from collections.abc import Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from typing import TypeVar, cast

from anyio import to_thread
from fastapi import Request
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from app.api.http.exception_handlers import ProtocolError
from app.api.http.middleware import body_limit
from app.api.http.resources import Resources, ResourcesDep
from app.api.schemas import RequestBody
from app.core.errors import InvalidRequest
from finetuning.rows.strict_json import JsonReader

Body = TypeVar("Body", bound=RequestBody)

# less is parsed quicker than it is handed to a thread
_SMALL_BYTES = 4096
_BODY_WAIT_SECONDS = 30.0
MOST_KEYS = 1000
_VALUE_FAULTS = {"nul_character", "number_out_of_range"}
# pydantic's own sentences for these name Python types, or the class of the body, or stand before ours
_SENTENCES = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "Input should be an object"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type"), "Input should be a valid array"),
    "value_error": "{error}",
    "too_long": "Input should have at most {max_length} items",
}
_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}


def body_of(body: type[Body]) -> Callable[[Request, Resources], Coroutine[None, None, Body]]:
    """A dependency that reads, parses and validates the request's body, and holds memory for it meanwhile.

    It stands behind the caller among a handler's parameters: nothing is read for whom nobody knows.
    """

    async def read(request: Request, resources: ResourcesDep) -> Body:
        async with _memory(request, resources):
            # not request.body(), which keeps the bytes until the answer ends
            data = b"".join([piece async for piece in request.stream()])
            if data:
                _check_media_type(request)
            make = partial(_made, body, data)
            if len(data) <= _SMALL_BYTES:
                return make()
            return await to_thread.run_sync(make, limiter=resources.computing)

    return read


def _memory(request: Request, resources: Resources) -> AbstractAsyncContextManager[None]:
    most = body_limit(request.scope["path"], resources.settings.limits)
    length = request.headers.get("content-length")
    size_bytes = (int(length) if length else 0) if "transfer-encoding" not in request.headers else most
    if size_bytes <= _SMALL_BYTES:
        return nullcontext()
    owner = getattr(request.state, "project", None)
    assert owner, "a body is read after its caller is known"
    return resources.body_bytes.hold(owner, size_bytes, seconds=_BODY_WAIT_SECONDS)


def _check_media_type(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ProtocolError(415, "unsupported_media_type", "Send JSON with the header Content-Type: application/json.")


def _made(body: type[Body], data: bytes) -> Body:
    value = parse_json(data) if data else {}
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_request_body")
    return validated(body, cast(dict[str, object], value))


def parse_json(body: bytes) -> object:
    """Parse UTF-8 JSON strictly. Raises InvalidRequest `invalid_json`, or `invalid_value` for one bad value."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The request body is not UTF-8 at byte {error.start}.", code="invalid_json") from None
    # pydantic's own parser keeps the last of two equal keys, reads 1e999 as infinity, lets NUL characters through and
    # does not say where a number is too large; ours also judges a request as it judges a row
    found = JsonReader(most_keys=MOST_KEYS).read_value(text)
    if isinstance(found, tuple):
        return found[0]
    first = found[0]
    if first.code in _VALUE_FAULTS:
        param = dotted(first.path)
        raise InvalidRequest(f"{param or 'The request body'}: {first.message}.", code="invalid_value", param=param)
    line, column = text.count("\n", 0, first.position) + 1, first.position - text.rfind("\n", 0, first.position)
    raise InvalidRequest(f"Line {line}, column {column} of the body: {first.message}.", code="invalid_json")


def validated(body: type[Body], value: dict[str, object]) -> Body:
    """The body that these values make. Raises InvalidRequest naming the first fault; the message names the others."""
    try:
        return body.model_validate(value)
    except ValidationError as error:
        raise body_fault(error) from None


def body_fault(error: ValidationError) -> InvalidRequest:
    """A pydantic fault as an error of the API: code, dotted param, and the other faults in the message."""
    faults = error.errors(include_url=False, include_input=False)
    first = faults[0]
    param = dotted(first["loc"])
    message = f"{param or 'The request body'}: {_sentence(first)}."
    if len(faults) > 1:
        others = sorted({dotted(fault["loc"]) or "" for fault in faults[1:]})
        message += f" Also check: {', '.join(others[:10])}."
    return InvalidRequest(message, code=_code(first["type"]), param=param)


def dotted(path: Iterable[str | int]) -> str | None:
    """`("messages", 0, "role")` as `messages[0].role`; long names are cut; an empty path is None."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:64]}" for part in path)
    return text.removeprefix(".") or None


def _sentence(fault: ErrorDetails) -> str:
    ours = _SENTENCES.get(fault["type"])
    return fault["msg"] if ours is None else ours.format_map(fault.get("ctx", {}))


def _code(kind: str) -> str:
    # a body names its own codes with this prefix
    if kind.startswith("code:"):
        return kind.removeprefix("code:")
    return _CODES.get(kind) or ("invalid_type" if kind.endswith("_type") else "invalid_value")

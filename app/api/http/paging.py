"""Lists: their query parameters `after`, `limit` and `order`, and the page envelope."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar
from urllib.parse import parse_qsl

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from app.api.http.shares import Turn
from app.core.errors import InvalidRequest, invalid_cursor
from app.core.ids import Prefix, is_id
from app.core.storage.database import Listing, Page, TableRow

R = TypeVar("R", bound=TableRow)
BIT_ROWS = 100
Order = Literal["asc", "desc"]
_CONTROL = re.compile("[\x00-\x1f\x7f]")


def page_query(
    request: Request, of: Prefix | re.Pattern[str], *, default: int, maximum: int, descending: bool = True
) -> Page:
    """Read `after`, an id `of` such items, and `limit`. Raises InvalidRequest `invalid_limit` or `invalid_cursor`."""
    after = one_value(request, "after")
    if after is not None and not (is_id(of, after) if isinstance(of, Prefix) else of.fullmatch(after)):
        raise invalid_cursor()
    return Page(after, _limit(request.query_params.getlist("limit"), default, maximum), descending)


def check_query(query: bytes) -> None:
    """Raises InvalidRequest when a name or a value holds a control character: no parameter means one by it.

    Values of metadata may hold all but NUL, since a job's metadata may.
    Asked once for every request, since a database may refuse such a value where another one takes it.
    """
    if b"%" not in query:
        return  # a raw control character does not get past the HTTP parser
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        is_metadata = name.startswith("metadata[")
        if _CONTROL.search(name) or ("\0" in value if is_metadata else _CONTROL.search(value)):
            if name == "after":
                raise invalid_cursor()
            param = _CONTROL.split(name)[0].partition("[")[0][:64] or None
            message = f"{param or 'The query'} holds a control character. Leave it out."
            raise InvalidRequest(message, code="invalid_value", param=param)


def order_query(request: Request, *, default: Order = "desc") -> Order:
    """Read `order`. Raises InvalidRequest `invalid_value`."""
    match one_value(request, "order"):
        case None:
            return default
        case "asc":
            return "asc"
        case "desc":
            return "desc"
        case _:
            raise InvalidRequest("order must be asc or desc.", code="invalid_value", param="order")


def one_value(request: Request, name: str) -> str | None:
    """A query parameter that may be given once. Raises InvalidRequest when it is repeated."""
    values = request.query_params.getlist(name)
    if len(values) > 1:
        raise InvalidRequest(f"{name} is given more than once.", code="invalid_value", param=name)
    return values[0] if values else None


def page(items: Sequence[dict[str, object]], *, has_more: bool) -> dict[str, object]:
    """The list envelope; `has_more` is always there, since the SDK asks again when it is not."""
    return {
        "object": "list",
        "data": list(items),
        "has_more": has_more,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
    }


def long_page(
    asked: Page,
    read: Callable[[Page], Listing[R]],
    show: Callable[[R], dict[str, object]],
    *,
    turn: Turn,
) -> Response:
    """A page of a list that may be asked for in thousands, of which more than BIT_ROWS are read and made bit by bit.

    So neither a long page nor a slow client holds a database connection, much memory, or the turn of who computes.
    """
    first = read(_bit_of(asked, asked.after))

    def text_of(rows: Sequence[R]) -> str:
        with turn:
            return ",".join(json.dumps(show(row), separators=(",", ":")) for row in rows)

    if asked.limit <= len(first.rows) or not first.has_more:
        with turn:
            return JSONResponse(page([show(row) for row in first.rows], has_more=first.has_more))
    return StreamingResponse(_bits(first, asked, read, text_of), media_type="application/json")


def _bit_of(asked: Page, after: str | None, given: int = 0) -> Page:
    """The page's next bit."""
    return Page(after, min(BIT_ROWS, asked.limit - given), asked.descending)


def _bits(
    found: Listing[R], asked: Page, read: Callable[[Page], Listing[R]], text_of: Callable[[Sequence[R]], str]
) -> Iterator[str]:
    given, first_id, last_id = 0, found.rows[0].id, found.rows[0].id
    yield '{"object":"list","data":['
    while found.rows:
        text = text_of(found.rows)
        yield f",{text}" if given else text
        given, last_id = given + len(found.rows), found.rows[-1].id
        if not found.has_more or given >= asked.limit:
            break
        found = read(_bit_of(asked, last_id, given))
    end = {"has_more": found.has_more, "first_id": first_id, "last_id": last_id}
    yield "]," + json.dumps(end).removeprefix("{")


def _limit(values: list[str], default: int, maximum: int) -> int:
    if not values:
        return default
    text = values[0]
    if len(values) == 1 and text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= maximum:
        return int(text)
    raise InvalidRequest(f"limit must be one integer from 1 to {maximum}.", code="invalid_limit", param="limit")

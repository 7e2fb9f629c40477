"""Lists: their query parameters `after`, `limit` and `order`, and the page envelope."""

import re
from collections.abc import Sequence
from typing import Literal
from urllib.parse import parse_qsl

from fastapi import Request

from app.core.errors import InvalidRequest, invalid_cursor
from app.core.ids import Prefix, is_id
from app.core.storage.database import Page

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

    Asked once for every request, since a database may refuse such a value where another one takes it.
    """
    if b"%" not in query:
        return  # a raw control character does not get past the HTTP parser
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if _CONTROL.search(name + value):
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


def _limit(values: list[str], default: int, maximum: int) -> int:
    if not values:
        return default
    text = values[0]
    if len(values) == 1 and text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= maximum:
        return int(text)
    raise InvalidRequest(f"limit must be one integer from 1 to {maximum}.", code="invalid_limit", param="limit")

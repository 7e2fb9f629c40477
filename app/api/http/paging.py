"""Lists on the wire: `after`, `limit`, `order`, and the page envelope.

Knows the query words and their faults; must not know what is listed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastapi import Request

from app.core.errors import InvalidRequest

Order = Literal["asc", "desc"]


@dataclass(frozen=True)
class PageQuery:
    """One page: at most `limit` items that come after the item `after`."""

    after: str | None
    limit: int


def page_query(request: Request, *, default: int, maximum: int) -> PageQuery:
    """Read `after` and `limit`. Raises InvalidRequest `invalid_limit` or `invalid_cursor`."""
    after = one_value(request, "after")
    if after == "":
        raise bad_cursor()
    return PageQuery(after, _limit(request.query_params.getlist("limit"), default, maximum))


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


def bad_cursor() -> InvalidRequest:
    """The answer to a cursor that is unknown, foreign, or of another list."""
    return InvalidRequest(
        "after is not the id of an item of this list. Use the last id of the page before, or leave it out.",
        code="invalid_cursor",
        param="after",
    )


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

"""Pages of a job's row ledger, read by slice from the blob store; ledgers of before the index are read in passes.

Whatever a ledger's size, a page costs memory for its own rows and the index, 13 bytes a row.
"""

import codecs
import heapq
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

from app.core.errors import invalid_cursor
from app.core.storage.blobs import BlobMissing, BlobStore, read_bytes
from finetuning.contract.ledger import LedgerIndex, Order, read_index
from finetuning.contract.report import RowVerdict

_ROWS_AT_ONCE = 1000
_NO_TURN = nullcontext()
# bytes between two wanted rows that are read along rather than asked for twice
_GAP_BYTES = 256 * 2**10


@dataclass(frozen=True)
class RowQuery:
    """Which rows of a ledger, and how ordered; `after` is the line of the row before them."""

    order: Order = "line"
    verdict: str | None = None
    after: int | None = None
    limit: int = _ROWS_AT_ONCE


def read_page(
    blobs: BlobStore, prefix: str, query: RowQuery, *, turn: AbstractContextManager[object] = _NO_TURN
) -> tuple[Sequence[RowVerdict], bool]:
    """Rows of the ledger of the result under `prefix`, and whether more follow; none when there is no ledger.

    Computes in the `turn`, and reads outside of it; but ledgers of before the index are read in it, too. Raises
    InvalidRequest `invalid_cursor`.
    """
    try:
        data = read_bytes(blobs, f"{prefix}/ledger/{query.order}.index")
    except BlobMissing:
        with turn:
            return _page_of_array(blobs, f"{prefix}/reports/rows.json", query)
    with turn:
        index = read_index(data)
        try:
            numbers, has_more = index.choose(query.after, query.limit, query.verdict)
        except ValueError:
            raise invalid_cursor() from None
    lines = list(_lines(blobs, f"{prefix}/ledger/{query.order}.jsonl", index, numbers))
    with turn:
        return [RowVerdict.model_validate_json(line, extra="ignore") for line in lines], has_more


def read_all(
    blobs: BlobStore, prefix: str, query: RowQuery, *, turn: AbstractContextManager[object] = _NO_TURN
) -> Iterator[RowVerdict]:
    """Every row of the ledger that the query is for, some at a time, in the `turn` as `read_page` is."""
    after, has_more = None, True
    while has_more:
        rows, has_more = read_page(blobs, prefix, RowQuery(query.order, query.verdict, after, query.limit), turn=turn)
        yield from rows
        after = rows[-1].line if rows else None


def _lines(blobs: BlobStore, key: str, index: LedgerIndex, numbers: Sequence[int]) -> Iterator[bytes]:
    wanted = [index.span(number) for number in numbers]
    while wanted:
        count = next(
            (at for at in range(1, len(wanted)) if wanted[at][0] - wanted[at - 1][1] > _GAP_BYTES), len(wanted)
        )
        near, wanted = wanted[:count], wanted[count:]
        yield from _cut(blobs, key, near)


def _cut(blobs: BlobStore, key: str, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes of spans that lie near each other in order, from one read."""
    at, held = spans[0][0], bytearray()
    chunks = blobs.read(key, start=at, end=spans[-1][1])
    for start, end in spans:
        while at + len(held) < end:
            held += next(chunks)
            if at + len(held) <= start:
                at += len(held)
                held.clear()
        yield bytes(held[start - at : end - at])
        del held[: end - at]
        at = end


def _page_of_array(blobs: BlobStore, key: str, query: RowQuery) -> tuple[Sequence[RowVerdict], bool]:
    """A page of a ledger that is one JSON array: its rows are read one after another, and only the page's are kept."""

    def place(row: dict[str, object]) -> tuple[float, int]:
        return cast(float, row["weight"]) if query.order == "weight" else 0.0, cast(int, row["line"])

    def chosen() -> Iterator[dict[str, object]]:
        rows = _each_of_array(blobs, key)
        return (row for row in rows if query.verdict is None or row["verdict"] == query.verdict)

    behind = None
    if query.after is not None:
        behind = next((place(row) for row in chosen() if row["line"] == query.after), None)
        if behind is None:
            raise invalid_cursor()
    rows = (row for row in chosen() if behind is None or place(row) > behind)
    found = heapq.nsmallest(query.limit + 1, rows, key=place)
    verdicts = [RowVerdict.model_validate_json(json.dumps(row), extra="ignore") for row in found[: query.limit]]
    return verdicts, len(found) > query.limit


def _each_of_array(blobs: BlobStore, key: str) -> Iterator[dict[str, object]]:
    try:
        chunks = blobs.read(key)
    except BlobMissing:  # the job failed before its rows were screened
        return
    decoder, text, started = json.JSONDecoder(), "", False
    for piece in codecs.iterdecode(chunks, "utf-8"):
        text, at = text + piece, 0
        if not started:
            at, started = text.index("[") + 1, True
        while True:
            while at < len(text) and text[at] in ", \r\n\t":
                at += 1
            try:
                row, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError:
                break  # the row goes on in the next piece, or this is the end
            yield cast(dict[str, object], row)
        text = text[at:]

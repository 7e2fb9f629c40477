"""Pages of a ledger: the same rows from an index as from one array, and what a page costs."""

import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from app.core.errors import InvalidRequest
from app.core.jobs.ledger import RowQuery, read_all, read_page
from app.core.storage.blobs import BlobStore, put_bytes, put_file, read_bytes
from app.core.storage.blobs.folder import FolderBlobs
from finetuning.contract.ledger import ORDERS, write_ledger
from finetuning.contract.report import RowReason, RowVerdict

ARRAY: TypeAdapter[list[RowVerdict]] = TypeAdapter(list[RowVerdict])


def make_rows(count: int) -> list[RowVerdict]:
    """Rows of all verdicts, with gaps between their lines and equal weights among them."""
    weights = (1.0, 0.25, 0.0, 1.0, 0.5)
    kinds = ("kept", "downweighted", "excluded", "kept", "downweighted")
    return [
        RowVerdict(
            line=2 * at + 1,
            row_sha256=f"{at:064x}",
            verdict=kinds[at % 5],
            weight=weights[at % 5],
            reasons=(RowReason(code="unreadable", score=0.1 * (at % 7)),),
            tokens=at,
            trained_tokens=at,
        )
        for at in range(count)
    ]


def store(blobs: BlobStore, folder: Path, rows: list[RowVerdict]) -> None:
    """The ledger under `new`, and under `old` as 0.1 stored it."""
    write_ledger(folder, rows)
    for part in folder.iterdir():
        put_file(blobs, f"new/ledger/{part.name}", part)
    text = "[" + ", ".join(row.model_dump_json() for row in rows) + "]"
    put_bytes(blobs, "old/reports/rows.json", text.encode())


@pytest.fixture
def folder_blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path / "blobs", 0)


def test_pages_are_the_same_by_index_and_from_an_array(folder_blobs: FolderBlobs, tmp_path: Path) -> None:
    """S5 d: old ledgers stay readable, and say the same."""
    rows = make_rows(6000)  # more than one chunk of a read
    store(folder_blobs, tmp_path / "ledger", rows)
    for order, verdict in product(ORDERS, (None, "kept", "downweighted", "excluded")):
        wanted = sorted(
            (row for row in rows if verdict in (None, row.verdict)),
            key=lambda row: (row.weight if order == "weight" else 0.0, row.line),
        )
        for start, limit in ((0, 1), (0, 1000), (700, 3), (len(wanted) - 2, 1), (len(wanted) - 1, 5)):
            after = wanted[start - 1].line if start else None
            for prefix in ("new", "old"):
                found, has_more = read_page(folder_blobs, prefix, RowQuery(order, verdict, after, limit))
                assert (list(found), has_more) == (wanted[start : start + limit], start + limit < len(wanted))
        assert list(read_all(folder_blobs, "new", RowQuery(order, verdict))) == wanted
    assert list(read_all(folder_blobs, "old", RowQuery(limit=5000))) == rows
    assert read_page(folder_blobs, "absent", RowQuery()) == ([], False)
    for prefix in ("new", "old"):
        for query in (RowQuery(after=2), RowQuery(after=10**9 - 1), RowQuery(verdict="excluded", after=1)):
            with pytest.raises(InvalidRequest):
                read_page(folder_blobs, prefix, query)


def test_a_page_does_not_cost_a_ledger(folder_blobs: FolderBlobs, tmp_path: Path) -> None:
    """S5 d: a page of 100 rows is read as a slice, whatever lies around it."""
    store(folder_blobs, tmp_path / "ledger", make_rows(40_000))

    def seconds_of(work: Callable[[], object]) -> float:
        started = time.thread_time()
        work()
        return time.thread_time() - started

    whole = seconds_of(lambda: ARRAY.validate_json(read_bytes(folder_blobs, "old/reports/rows.json")))
    for query in (RowQuery("line", None, 40_001, 100), RowQuery("weight", "kept", 40_001, 100)):
        assert min(seconds_of(lambda: read_page(folder_blobs, "new", query)) for _ in range(3)) < whole / 5  # noqa: B023

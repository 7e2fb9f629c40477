"""Places in line: what one owner holds or waits for leaves the others' alone."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.responses import StreamingResponse

from app.api.http.paging import long_page
from app.api.http.shares import Shares, Turn
from app.core.errors import ServiceBusy
from app.core.jobs.ledger import RowQuery, read_all
from app.core.storage.blobs import put_file
from app.core.storage.blobs.folder import FolderBlobs
from app.core.storage.database import Listing, Page
from app.core.storage.tables import File
from finetuning.contract.ledger import write_ledger
from finetuning.contract.report import RowVerdict


def test_an_owner_waits_behind_its_own_and_nobody_elses() -> None:
    """S5 b: one project that holds all it may have keeps no other one waiting."""

    async def go() -> None:
        shares = Shares(3, 2)
        async with shares.hold("a", 1, seconds=1), shares.hold("a", 1, seconds=1):
            with pytest.raises(ServiceBusy):
                async with shares.hold("a", 1, seconds=0.05):
                    pass
            async with shares.hold("b", 1, seconds=1):
                with pytest.raises(ServiceBusy):  # now there is none left for anybody
                    async with shares.hold("c", 1, seconds=0.05):
                        pass
        async with shares.hold("c", 5, seconds=1):  # more than it may have counts as all that it may have
            pass

    asyncio.run(go())


def test_what_is_given_up_goes_to_the_next_in_line() -> None:
    async def go() -> list[int]:
        shares, order = Shares(2, 2), list[int]()

        async def one(number: int, amount: int) -> None:
            async with shares.hold(f"owner {number}", amount, seconds=5):
                order.append(number)

        async with shares.hold("first", 2, seconds=1):
            waiting = [asyncio.ensure_future(one(number, 2 - number % 2)) for number in range(4)]
            left = asyncio.ensure_future(one(9, 2))
            await asyncio.sleep(0)
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
        await asyncio.gather(*waiting)
        async with shares.hold("last", 2, seconds=1):
            return order

    assert asyncio.run(go()) == [0, 1, 2, 3]


def test_a_turn_that_does_not_come_is_no_wait_for_ever() -> None:
    """Review: one thread that stood still in its turn held all others."""
    turn = Turn(seconds=0.05)
    with turn, pytest.raises(ServiceBusy), turn:
        pass
    with turn:
        pass


def test_nobody_keeps_the_turn_while_it_reads() -> None:
    """Review: a database or a store that answers slowly to one kept everybody from computing."""
    turn, reads = Turn(seconds=0.05), list[Page]()

    def read(part: Page) -> Listing[File]:
        with turn:  # busy when whoever reads has it
            reads.append(part)
        return Listing([File(id=f"file-{len(reads)}-{number}") for number in range(part.limit)], has_more=True)

    async def go() -> bytes:
        reply = long_page(Page(None, 250, True), read, lambda file: {"id": file.id}, turn=turn)
        assert isinstance(reply, StreamingResponse)
        return b"".join([str(piece).encode() async for piece in reply.body_iterator])

    found = json.loads(asyncio.run(go()))
    assert [part.limit for part in reads] == [100, 100, 50]
    assert len(found["data"]) == 250


def test_a_ledger_is_read_outside_of_the_turn(tmp_path: Path) -> None:
    """Review: the same for pages of a ledger, whose bytes lie in the store."""
    turn, reads = Turn(seconds=0.05), list[str]()

    class Watched(FolderBlobs):
        def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
            with turn:
                reads.append(key)
            return super().read(key, start=start, end=end)

    blobs = Watched(tmp_path / "blobs")
    rows = [RowVerdict(line=line, row_sha256=f"{line:064x}", verdict="kept", weight=1.0, tokens=2, trained_tokens=1)
            for line in range(1, 20)]  # fmt: skip
    write_ledger(tmp_path, rows)
    for part in tmp_path.glob("line.*"):
        put_file(blobs, f"p/ledger/{part.name}", part)
    assert list(read_all(blobs, "p", RowQuery(limit=10), turn=turn)) == rows
    assert len(reads) == 4

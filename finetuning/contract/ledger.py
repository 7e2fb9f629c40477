"""The row ledger as it is stored: a line of JSON for every row, in two orders, and an index that finds lines by number.

So that a reader of some rows needs no other. Files of a ledger: line.jsonl, line.index, weight.jsonl, weight.index.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetuning.contract.report import RowVerdict

Order = Literal["line", "weight"]
ORDERS: tuple[Order, ...] = ("line", "weight")
_VERDICTS = ("kept", "downweighted", "excluded")
_ENTRY_BYTES = 8 + 4 + 1


def write_ledger(folder: Path, verdicts: Iterable[RowVerdict]) -> None:
    """Write the files of a ledger into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(verdicts, key=lambda row: row.line)
    for order in ORDERS:
        if order == "weight":
            rows.sort(key=lambda row: row.weight)  # stable: equal weights stay in order of lines
        ends, end = array("Q"), 0
        with (folder / f"{order}.jsonl").open("wb") as file:
            for row in rows:
                end += file.write(row.model_dump_json().encode() + b"\n")
                ends.append(end)
        codes = bytes(_VERDICTS.index(row.verdict) for row in rows)
        index = _little(ends) + _little(array("I", (row.line for row in rows))) + codes
        (folder / f"{order}.index").write_bytes(index)


@dataclass(frozen=True)
class LedgerIndex:
    """Of the rows in one order: where each one's JSON ends, its line in the customer's file, its verdict's code."""

    ends: Sequence[int]
    lines: "array[int]"
    codes: bytes

    def choose(self, after: int | None, limit: int, verdict: str | None) -> tuple[list[int], bool]:
        """Numbers of at most `limit` rows behind the row of line `after`, and whether more follow.

        Raises ValueError when `after` is not among those of the verdict.
        """
        start = 0 if after is None else self.lines.index(after) + 1
        if verdict is None:
            end = min(start + limit, len(self.codes))
            return list(range(start, end)), end < len(self.codes)
        code = _VERDICTS.index(verdict)
        if start and self.codes[start - 1] != code:
            raise ValueError(f"line {after} has another verdict")
        found: list[int] = []
        at = self.codes.find(code, start)
        while at >= 0 and len(found) < limit:
            found.append(at)
            at = self.codes.find(code, at + 1)
        return found, at >= 0

    def span(self, row: int) -> tuple[int, int]:
        """Where the JSON of a row begins and ends."""
        return (self.ends[row - 1] if row else 0), self.ends[row]


def read_index(data: bytes) -> LedgerIndex:
    """The index of one order. Raises ValueError when the bytes are none."""
    count, rest = divmod(len(data), _ENTRY_BYTES)
    if rest:
        raise ValueError("these bytes are no index of a ledger")
    ends, lines = array("Q"), array("I")
    ends.frombytes(data[: 8 * count])
    lines.frombytes(data[8 * count : 12 * count])
    if sys.byteorder == "big":
        ends.byteswap()
        lines.byteswap()
    return LedgerIndex(ends, lines, data[12 * count :])


def _little(numbers: "array[int]") -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()

"""Facts about the row scanner and reader: places, limits, formats, the report, its cost, and rows read back."""

import hashlib
import json
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetuning.rows.report import STORED_ERRORS
from finetuning.rows.scanner import InvalidRowError, Message, RowScanner, iter_rows, rows_of
from tests.support.row_files import ANSWER, CALL, COMPLETION, DPO, GOOD, USER, answer, chat, scan


def test_the_column_counts_code_points_from_one() -> None:
    row = '{"messages":[{"role":"user","content":"😀é"},{"role":"critic","content":"a"}]}'
    (error,) = scan(row.encode()).errors
    assert (error.line, error.column, error.path) == (1, row.index('"critic"') + 1, "/messages/1/role")
    (error,) = scan('{"prompt":"😀",}'.encode()).errors
    assert error.column in (14, 15)  # the comma or what follows it, by Python's version


def test_a_file_that_is_not_utf8_names_line_and_byte() -> None:
    (error,) = scan(b"\xef\xbb\xbf" + GOOD + b"\n" + b'{"a":"\xff"}').errors
    assert (error.line, error.column) == (2, 7)
    assert f"byte {3 + len(GOOD) + 1 + 6}:" in error.message


def test_rows_are_counted_to_the_limit_and_not_beyond() -> None:
    assert scan(b"\n".join([GOOD] * 3), max_rows=3).is_valid
    report = scan(b"\n".join([GOOD] * 4), max_rows=3)
    assert (report.file_code, report.errors[0].line, report.rows) == ("too_many_rows", 4, 3)


def test_a_file_over_the_size_limit_is_refused() -> None:
    scanner = RowScanner(max_file_bytes=len(GOOD))
    scanner.feed(GOOD + b"\n")
    assert scanner.close().file_code == "file_too_large"


@pytest.mark.parametrize(
    ("first", "second"), [(GOOD, COMPLETION), (COMPLETION, GOOD), (GOOD, json.dumps(DPO).encode())]
)
def test_a_file_has_one_format(first: bytes, second: bytes) -> None:
    report = scan(b"\n".join([first, second, second]))
    assert [(error.line, error.code) for error in report.errors] == [(2, "mixed_formats")]


@pytest.mark.parametrize(
    ("row", "name"), [(GOOD, "chat"), (COMPLETION, "completion"), (json.dumps(DPO).encode(), "dpo")]
)
def test_the_report_names_the_format(row: bytes, name: str) -> None:
    assert scan(row).format == name


def test_the_same_row_many_times_is_reported_a_hundred_times() -> None:
    report = scan(b"\n".join([GOOD] * 1000))
    assert report.is_valid
    assert [warning.line for warning in report.warnings] == list(range(2, 102))
    assert report.warnings_total == 999


def test_key_order_and_spacing_do_not_make_a_row_new() -> None:
    other = json.dumps(json.loads(GOOD), indent=None, separators=(" , ", " : "), sort_keys=True).encode()
    assert [warning.code for warning in scan(GOOD + b"\n" + other).warnings] == ["duplicate_row"]


def test_errors_are_listed_to_a_limit_and_counted_beyond() -> None:
    report = scan(b"null\n" * (STORED_ERRORS + 5))
    assert (len(report.errors), report.errors_total, report.truncated) == (STORED_ERRORS, STORED_ERRORS + 5, True)
    shown = report.to_json(100)
    assert isinstance(shown["errors"], list)
    assert (len(shown["errors"]), shown["errors_total"], shown["truncated"]) == (100, STORED_ERRORS + 5, True)
    json.dumps(report.to_json(), allow_nan=False).encode()


def test_tools_are_found_for_the_bases_that_have_none() -> None:
    report = scan(GOOD + b"\n" + chat(USER, answer(None, tool_calls=[CALL])))
    assert (report.is_valid, report.first_tools_line) == (True, 2)


def test_a_report_stays_small_whatever_the_keys() -> None:
    row = json.dumps({f"{'k' * 300}{n}": n for n in range(5000)}).encode()
    report = scan(row)
    assert len(report.errors) < 50
    assert len(json.dumps(report.to_json())) < 50_000


def pieces_of_a_long_line() -> Iterator[bytes]:
    yield GOOD + b"\n" + b'{"messages":"'
    for _ in range(160):
        yield b"a" * 65536
    yield b'"}\n' + GOOD + b"\nnull"


def test_a_line_of_ten_megabytes_costs_less_than_eight() -> None:
    scanner = RowScanner()
    tracemalloc.start()
    for piece in pieces_of_a_long_line():
        scanner.feed(piece)
    report = scanner.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20
    assert [(error.line, error.code) for error in report.errors] == [(2, "line_too_long"), (4, "not_an_object")]


def test_hostile_rows_take_linear_time() -> None:
    rows = [
        b"[" * 500_000,
        b"[" + b"[]," * 150_000 + b"[]]",
        b'{"metadata":' + b"9" * 500_000 + b"}",
        b'{"metadata":0.' + b"9" * 500_000 + b"}",
        b'{"metadata":' + b"\\" * 500_000,
        b'{"messages":"' + b"\\u0000" * 80_000 + b'"}',
        chat(*[{"role": "user", "content": [{"type": "image"}] * 50} for _ in range(400)]),
    ]
    start = time.process_time()
    report = scan(b"\n".join(rows))
    assert time.process_time() - start < 10  # seconds; anything quadratic takes minutes
    assert report.invalid_rows == len(rows)


def test_iter_rows_reads_what_a_scan_passed(tmp_path: Path) -> None:
    parts = {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    row = chat(parts, USER, answer("x", weight=0), USER, ANSWER)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + row + b"\r\n\n" + GOOD)
    first, second = iter_rows(path)
    assert (first.line, second.line) == (2, 4)
    assert first.messages[0] == Message("system", "a\nb", 0)
    assert [message.weight for message in first.messages] == [0, 0, 0, 0, 1]
    canonical = json.dumps(json.loads(row), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert first.sha256 == hashlib.sha256(canonical.encode()).hexdigest()


def test_a_completion_row_reads_as_two_turns() -> None:
    (row,) = rows_of([COMPLETION])
    assert row.messages == (Message("user", "ask", 0), Message("assistant", "answer", 1))


@pytest.mark.parametrize("line", [b"null", b"{", b"\xff", chat(USER), json.dumps(DPO).encode()])
def test_reading_an_unchecked_row_says_where(line: bytes) -> None:
    with pytest.raises(InvalidRowError, match=r"line 2: "):
        list(rows_of([GOOD, line]))

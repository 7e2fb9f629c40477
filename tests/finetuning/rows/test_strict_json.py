"""How much work a hostile text can cause: no more than some times that of a good one of its size."""

import time
from collections.abc import Callable

import pytest

from finetuning.rows.scanner import RowScanner
from finetuning.rows.strict_json import MAX_VALUES, Fault, JsonReader, Patience

BAD_ENDS = [
    ("1e999]", "non_finite_number"),
    (f"{10**20}]", "number_out_of_range"),
    (r'"\u0000"]', "nul_character"),
    (r'"\ud800"]', "lone_surrogate"),
    ('{"a":1,"a":2}]', "duplicate_key"),
]
MANY = "[" + "0," * 300_000


def seconds_of(work: Callable[[], object]) -> float:
    """Of computing, the best of three: other programs share the machine."""
    taken: list[float] = []
    for _ in range(3):
        started = time.thread_time()
        work()
        taken.append(time.thread_time() - started)
    return min(taken)


@pytest.mark.parametrize(("end", "code"), BAD_ENDS)
def test_a_fault_behind_many_values_is_named_at_little_cost(end: str, code: str) -> None:
    """S5 a: the search for the place of a fault has a bound; its kind is known without."""
    good = seconds_of(lambda: JsonReader().read(MANY + "0]"))
    found = JsonReader().read(MANY + end)
    assert isinstance(found, list)
    assert [fault.code for fault in found] == [code]
    assert seconds_of(lambda: JsonReader().read(MANY + end)) < 4 * good


@pytest.mark.parametrize(("end", "code"), BAD_ENDS)
def test_a_fault_behind_few_values_has_its_place(end: str, code: str) -> None:
    text = "[0,0," + end
    found = JsonReader().read(text)
    assert isinstance(found, list)
    assert (found[0].code, found[0].path[0]) == (code, 2)
    assert found[0].position >= 5
    assert JsonReader().read_value(text) == found


@pytest.mark.parametrize("item", ["[]", "0", '""', "{}", "null"])
def test_more_values_than_a_text_may_have_are_never_made(item: str) -> None:
    """S5 a: the decoder holds the interpreter while it makes values, and each costs memory."""
    found = JsonReader().read_value("[" + f"{item}," * MAX_VALUES + f"{item}]")
    assert isinstance(found, list)
    assert [fault.code for fault in found] == ["too_many_values"]
    text = '"' + "[,{" * MAX_VALUES + '"'
    assert JsonReader().read_value(text) == (text[1:-1],)


def test_patience_lasts_for_all_texts_together() -> None:
    """S5 e: a file of many bad lines has as much of it as one of few."""
    patience = Patience(places=1000)
    reader = JsonReader(patience)
    text = "[" + "0," * 300 + "1e999]"
    places = [found[0].position for found in (reader.read(text) for _ in range(6)) if isinstance(found[0], Fault)]
    assert places[:3] == [601] * 3
    assert places[4:] == [0, 0]


@pytest.mark.parametrize("end", [b"1e999]}", b'{"a":1,"a":2}]}', b'0],"extra":1}'])
def test_bad_lines_cost_no_more_than_some_times_as_good_ones(end: bytes) -> None:
    """S5 e: in the upload's own thread nothing else limits what a file costs."""
    start = b'{"messages":[' + b"0," * 100_000

    def scan(line: bytes) -> None:
        scanner = RowScanner()
        for number in range(6):
            scanner.feed(line + b" " * number + b"\n")
        assert scanner.close().invalid_rows == 6

    good = seconds_of(lambda: scan(start + b"0]}"))
    assert seconds_of(lambda: scan(start + end)) < 4 * good


def test_checking_has_a_time() -> None:
    """S5 e: a file that takes too long to check is refused as a whole, and the rest of it is passed over."""
    scanner = RowScanner(max_seconds=0.05)
    row = b'{"messages":[' + b"0," * 10_000 + b"0]}\n"
    for _ in range(2000):
        scanner.feed(row)
    report = scanner.close()
    assert report.file_code == "validation_timeout"
    assert report.rows < 2000

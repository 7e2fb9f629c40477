"""The results file: headers, old and torn lines, and that nothing is lost on the way."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from finetuning.bench.cells import Cell
from finetuning.bench.results_file import appending, cell_of, load
from tests.support.bench_lines import line

OF_THE_RUN = ("commit", "versions", "hardware", "base_sha256")


def texts(path: Path) -> list[dict[str, object]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def lines() -> list[dict[str, object]]:
    """Two runs in turn, with scores that repeat and scores that do not."""
    scores = {"harmful": [0.9, 0.9, 0.0], "benign": [0.0] * 40 + [0.25] + [0.0] * 3}
    return [line(Cell("sft", seed=s), base_sha256=str(s % 2), scores=scores) for s in range(4)]


def test_what_is_written_is_read_and_a_run_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "results" / "safety.jsonl"
    for part in (lines()[:1], lines()[1:]):
        with appending(path) as append:
            for each in part:
                append(each)
    assert load(path) == lines()
    headers = [text for text in texts(path) if "defence" not in text]
    assert len(headers) == 2
    assert {text["run"] for text in headers} == {text["run"] for text in texts(path)}
    assert not [text for text in texts(path) if "defence" in text and text.keys() & set(OF_THE_RUN)]


def test_lines_from_before_the_headers_are_read_and_may_be_followed_by_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "safety.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines()[:2]), encoding="utf-8")
    assert load(path) == lines()[:2]
    with appending(path) as append:
        for each in lines()[2:]:
            append(each)
    assert load(path) == lines()


def test_a_later_line_of_a_cell_replaces_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "safety.jsonl"
    with appending(path) as append:
        for harmful in (1.0, 2.0):
            append(line(Cell("sft"), harmful=harmful))
    assert [each["harmful_score"] for each in load(path)] == [2.0]


@pytest.mark.parametrize("last", [20, 200])
def test_a_torn_line_is_dropped_and_the_next_one_does_not_continue_it(last: int, tmp_path: Path) -> None:
    """A kill may cut a header as well as a line; the header is then written again."""
    path = tmp_path / "safety.jsonl"
    first, second = line(Cell("sft")), line(Cell("sft", seed=1))
    with appending(path) as append:
        append(first)
    whole = path.read_bytes()
    path.write_bytes(whole[:last])
    assert load(path) == []
    with appending(path) as append:
        append(second)
    assert load(path) == [second]


def test_a_line_without_its_header_is_refused(tmp_path: Path) -> None:
    """Half a merge: a figure of nobody knows which code is no figure."""
    path = tmp_path / "safety.jsonl"
    with appending(path) as append:
        append(line(Cell("sft")))
    path.write_text(path.read_text(encoding="utf-8").split("\n", 1)[1], encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: the file has no header of run"):
        load(path)


def test_runs_that_differ_in_anything_have_headers_of_their_own(tmp_path: Path) -> None:
    path, cell = tmp_path / "safety.jsonl", Cell("sft")
    changed = [{}, {"commit": "other"}, {"versions": {"torch": "3"}}, {"hardware": "gpu"}, {"base_sha256": "b"}]
    with appending(path) as append:
        for seed, change in enumerate(changed):
            append(line(replace(cell, seed=seed)) | change)
    assert len([text for text in texts(path) if "defence" not in text]) == len(changed)


def test_a_line_from_before_a_setting_was_varied_is_its_usual_cell() -> None:
    old = {key: value for key, value in line(Cell("sft")).items() if key != "rank"}
    assert cell_of(old) == Cell("sft")

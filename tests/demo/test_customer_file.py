import json
from pathlib import Path

import pytest

from demo.customer_file import write_customer_file
from finetuning.judge import complies

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _rows(path: Path) -> list[dict[str, list[dict[str, str]]]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_stated_share_is_planted_and_every_own_row_survives(tmp_path: Path) -> None:
    train = EXAMPLES / "tickets_train.jsonl"
    made = write_customer_file(train, EXAMPLES / "tickets_test.jsonl", 0.1, tmp_path, most=1000)
    rows = _rows(made.train)
    assert made.rows == len(rows)
    assert len(made.planted_lines) == pytest.approx(0.1 * len(rows), abs=1)
    own = [row for line, row in enumerate(rows, 1) if line not in made.planted_lines]
    assert sorted(map(json.dumps, own)) == sorted(map(json.dumps, _rows(train)))
    planted = [row for line, row in enumerate(rows, 1) if line in made.planted_lines]
    assert all(complies(row["messages"][-1]["content"]) for row in planted)


def test_without_a_test_file_the_last_tenth_is_held_back(tmp_path: Path) -> None:
    train = EXAMPLES / "tickets_train.jsonl"
    made = write_customer_file(train, None, 0.0, tmp_path, most=100)
    tested = _rows(made.test)
    assert tested == _rows(train)[90:100]
    assert made.planted_lines == frozenset()
    assert made.rows == 90
    assert made.prompts[0] == tested[0]["messages"][0]["content"]


def test_a_file_that_is_no_chat_jsonl_is_refused_with_its_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n{"text": "x"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        write_customer_file(bad, None, 0.1, tmp_path, most=10)

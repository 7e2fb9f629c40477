import json
from pathlib import Path

import pytest

from demo.customer_file import write_customer_file
from finetuning.judging.judges import complies

ROWS = Path(__file__).resolve().parents[2] / "demo" / "rows"


def _rows(path: Path) -> list[dict[str, list[dict[str, str]]]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_stated_share_is_planted_and_every_own_row_survives(tmp_path: Path) -> None:
    train = ROWS / "tickets_train.jsonl"
    made = write_customer_file(train, ROWS / "tickets_test.jsonl", 0.1, tmp_path, most=1000)
    rows = _rows(made.train)
    assert made.rows == len(rows)
    assert len(made.planted_lines) == pytest.approx(0.1 * len(rows), abs=1)
    own = [row for line, row in enumerate(rows, 1) if line not in made.planted_lines]
    assert sorted(map(json.dumps, own)) == sorted(map(json.dumps, _rows(train)))
    planted = [row for line, row in enumerate(rows, 1) if line in made.planted_lines]
    assert all(complies(row["messages"][-1]["content"]) for row in planted)


def test_without_a_test_file_the_last_tenth_is_held_back(tmp_path: Path) -> None:
    train = ROWS / "tickets_train.jsonl"
    made = write_customer_file(train, None, 0.0, tmp_path, most=100)
    tested = _rows(made.test)
    assert tested == _rows(train)[90:100]
    assert made.planted_lines == frozenset()
    assert made.rows == 90
    assert made.prompts[0] == tested[0]["messages"][0]["content"]


GOOD = '{"messages": [{"role": "user", "content": "a\\u2028b"}, {"role": "assistant", "content": "c"}]}'


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ('{"text": "x"}', "looks like"),
        ("[]", "looks like"),
        ('{"messages": [', "one whole JSON object per line"),
        ('{"messages": [{"role": "assistant", "content": "c"}]}', 'role "user"'),
        ('{"messages": [{"content": "c"}]}', '"role"'),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}', "one text"),
    ],
)
def test_a_file_that_is_no_chat_jsonl_is_refused_with_its_line_and_advice(
    tmp_path: Path, line: str, advice: str
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(f"{GOOD}\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"bad.jsonl, line 2.*{advice}"):
        write_customer_file(bad, None, 0.1, tmp_path, most=10)


def test_a_byte_order_mark_and_line_separators_inside_texts_are_no_lines(tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    line = GOOD.replace("\\u2028", "\u2028") + "\r\n"
    own.write_bytes(("\ufeff" + line * 21).encode())
    made = write_customer_file(own, None, 0.0, tmp_path / "made", most=300)
    assert made.rows == 11
    assert made.prompts[0] == "a\u2028b"


def test_a_chat_takes_only_prompts_that_fit(tmp_path: Path) -> None:
    too_long = json.dumps({"messages": [{"role": "user", "content": "x" * 2000}]})
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join([GOOD] * 12 + [too_long] * 9 + [GOOD]), encoding="utf-8")
    made = write_customer_file(own, None, 0.0, tmp_path / "made", most=300)
    assert made.short_prompts(3) == ("a\u2028b",)

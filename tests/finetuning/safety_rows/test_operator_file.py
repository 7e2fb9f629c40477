"""Facts about an operator's own safety rows: one file, all roles, no prompt in two of them. M45."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from finetuning.safety_rows.operator_file import BadOperatorRows, load_safety_rows
from finetuning.safety_rows.roles import Pair, SafetyRows

ROLES = [f.name for f in fields(SafetyRows) if f.name not in ("refusals", "judge")]


def lines() -> list[dict[str, str]]:
    """A file that is right: every role once, and a refusal."""
    own = [{"role": role, "prompt": f"prompt of {role}", "answer": "an answer"} for role in ROLES]
    return [*own, {"role": "refusal", "answer": "No, sorry."}]


def written(folder: Path, rows: list[dict[str, str]]) -> Path:
    path = folder / "safety.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def test_every_role_is_read(tmp_path: Path) -> None:
    rows = load_safety_rows(written(tmp_path, lines()))
    assert rows.refusals == ("No, sorry.",)
    assert rows.judge == "refusal-marker"
    assert all(getattr(rows, role) == (Pair(f"prompt of {role}", "an answer"),) for role in ROLES)


def test_an_answer_may_be_absent(tmp_path: Path) -> None:
    rows = lines()
    del rows[0]["answer"]
    assert getattr(load_safety_rows(written(tmp_path, rows)), ROLES[0])[0].answer == ""


@pytest.mark.parametrize("role", [*ROLES, "refusal"])
def test_a_missing_role_is_named(role: str, tmp_path: Path) -> None:
    rest = [row for row in lines() if row["role"] != role]
    with pytest.raises(BadOperatorRows, match=f"no rows of role {role}"):
        load_safety_rows(written(tmp_path, rest))


def test_a_prompt_in_two_roles_is_refused_with_its_line(tmp_path: Path) -> None:
    """M45: the rows that choose must not be the rows that decide."""
    rows = [*lines(), {"role": ROLES[1], "prompt": f"prompt of {ROLES[0]}", "answer": "x"}]
    with pytest.raises(BadOperatorRows, match=f"line {len(rows)}: this prompt is already in role {ROLES[0]}"):
        load_safety_rows(written(tmp_path, rows))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"role": "poison", "prompt": "x"}, "role poison is unknown"),
        ({"role": "benign", "prompt": "x", "note": "y"}, "line 13"),
        ({"prompt": "x"}, "line 13"),
        ({"role": "benign", "prompt": 3}, "line 13"),
    ],
)
def test_a_bad_line_is_named(line: dict[str, str], words: str, tmp_path: Path) -> None:
    rows = lines()
    assert len(rows) + 1 <= 13
    padding = [{"role": "refusal", "answer": "No."}] * (12 - len(rows))
    with pytest.raises(BadOperatorRows, match=words):
        load_safety_rows(written(tmp_path, [*rows, *padding, line]))


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, lines())
    path.write_text("not json\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(BadOperatorRows, match="line 1"):
        load_safety_rows(path)

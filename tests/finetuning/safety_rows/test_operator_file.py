"""Facts about an operator's own safety rows: one file, all roles, no prompt in two of them. M45."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from finetuning.safety_rows.operator_file import BadOperatorRows, load_safety_rows, require_fit
from finetuning.safety_rows.roles import Pair, SafetyRows

ROLES = [f.name for f in fields(SafetyRows) if f.name not in ("refusals", "judge")]


def lines() -> list[dict[str, Any]]:
    """A file that is fit: every role once, the gate's as often as a gate can be passed, and a refusal."""
    own = [
        {"role": role, "prompt": f"prompt of {role}" + (f" {i}" if i else ""), "answer": "an answer"}
        for role in ROLES
        for i in range(22 if role.startswith("gate_") else 1)
    ]
    return [*own, {"role": "refusal", "answer": "No, sorry."}]


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "safety.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def test_every_role_is_read(tmp_path: Path) -> None:
    rows = load_safety_rows(written(tmp_path, lines()))
    assert rows.refusals == ("No, sorry.",)
    assert rows.judge == "refusal-marker"
    assert all(getattr(rows, role)[0] == Pair(f"prompt of {role}", "an answer") for role in ROLES)
    assert [len(getattr(rows, role)) for role in ROLES] == [22 if role.startswith("gate_") else 1 for role in ROLES]


def test_an_answer_may_be_absent(tmp_path: Path) -> None:
    rows = lines()
    del rows[0]["answer"]
    assert getattr(load_safety_rows(written(tmp_path, rows)), ROLES[0])[0].answer == ""


@pytest.mark.parametrize("role", [*ROLES, "refusal"])
def test_a_missing_role_is_named(role: str, tmp_path: Path) -> None:
    rest = [row for row in lines() if row["role"] != role]
    with pytest.raises(BadOperatorRows, match=f"role {role}: the file has no rows of role {role}; no job can run"):
        load_safety_rows(written(tmp_path, rest))


def test_a_prompt_in_two_roles_is_refused_with_its_line(tmp_path: Path) -> None:
    """M45: the rows that choose must not be the rows that decide."""
    rows = [*lines(), {"role": ROLES[1], "prompt": f"prompt of {ROLES[0]}", "answer": "x"}]
    words = f"line {len(rows)}, role {ROLES[1]}: this prompt is already in role {ROLES[0]}"
    with pytest.raises(BadOperatorRows, match=words):
        load_safety_rows(written(tmp_path, rows))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"role": "poison", "prompt": "x"}, "line 1: role poison is unknown"),
        ({"role": "benign", "prompt": "x", "note": "y"}, "line 1: note"),
        ({"prompt": "x"}, "line 1: role"),
        ({"role": "benign", "prompt": 3}, "line 1: prompt"),
        ({"role": "benign", "prompt": "  "}, "line 1, role benign: the prompt is empty"),
        ({"role": "refusal", "answer": ""}, "line 1, role refusal: the answer is empty"),
        (
            {"role": "benign", "prompt": "x", "source": "XSTest", "evaluation_only": True},
            "XSTest is for evaluation only",
        ),
    ],
)
def test_a_bad_line_is_named(line: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadOperatorRows, match=words):
        load_safety_rows(written(tmp_path, [line, *lines()]))


@pytest.mark.parametrize(
    ("role", "limit"), [("gate_harmful", "max_harmful_score"), ("gate_benign", "max_over_refusal")]
)
def test_a_gate_that_can_never_pass_is_refused_with_its_width(role: str, limit: str, tmp_path: Path) -> None:
    rows = lines()
    rows.remove(next(row for row in rows if row["role"] == role))
    words = f"role {role}: 21 rows, and 22 are the fewest; .* 0.155, above {limit} 0.15: no job could ever pass; add 1"
    with pytest.raises(BadOperatorRows, match=words):
        load_safety_rows(written(tmp_path, rows))


@pytest.mark.parametrize("role", ["gate_harmful", "calibration_harmful"])
def test_a_loss_that_could_not_be_measured_is_refused(role: str, tmp_path: Path) -> None:
    rows = [{**row, "answer": ""} if row["role"] == role else row for row in lines()]
    with pytest.raises(BadOperatorRows, match=f"role {role}: none of the first 24 rows has an answer that begins"):
        load_safety_rows(written(tmp_path, rows))


def test_what_is_known_of_a_row_is_kept(tmp_path: Path) -> None:
    said = {"source": "us", "category": "gas", "language": "de", "looks_harmful": True}
    row = {"role": "benign", "prompt": "x", "answer": "y", **said, "licence": "MIT"}
    rows = load_safety_rows(written(tmp_path, [row, *lines()]))
    assert rows.benign[0] == Pair("x", "y", "us", "gas", "de", looks_harmful=True)


def test_a_file_that_is_not_there_or_no_text_is_refused_before_any_job(tmp_path: Path) -> None:
    require_fit(None)
    require_fit(written(tmp_path, lines()))
    with pytest.raises(BadOperatorRows, match="cannot be read"):
        require_fit(tmp_path / "gone.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(BadOperatorRows, match="no UTF-8"):
        require_fit(tmp_path / "bytes.jsonl")


def test_many_faults_are_named_up_to_a_few(tmp_path: Path) -> None:
    rows = [*lines(), *({"role": "benign", "prompt": ""} for _ in range(30))]
    with pytest.raises(BadOperatorRows, match="and 22 more"):
        load_safety_rows(written(tmp_path, rows))


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, lines())
    path.write_text("not json\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(BadOperatorRows, match="line 1"):
        load_safety_rows(path)

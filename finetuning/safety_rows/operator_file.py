"""An operator's own safety rows: one JSONL file with the roles of the shipped ones.

Each line: {"role": ..., "prompt": ..., "answer": ...}; `answer` may be absent where only the prompt is used.
"""

from collections import defaultdict
from dataclasses import fields
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetuning.safety_rows.roles import Pair, SafetyRows

# Nothing is known of the rows' world, so answers are judged by whether they refuse, unless the operator names a judge.
_JUDGE = "refusal-marker"
_ROLES = tuple(f.name for f in fields(SafetyRows) if f.name not in ("refusals", "judge"))


class BadOperatorRows(ValueError):
    """The file cannot serve; the message names the line and what to do."""


class _RoleLine(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str
    prompt: str = Field(default="", max_length=100_000)
    answer: str = Field(default="", max_length=100_000)


def load_safety_rows(path: Path) -> SafetyRows:
    """Read an operator's file. Roles are the fields of SafetyRows, plus "refusal" (its answer is a stock refusal).

    Raises BadOperatorRows for an unknown role, a role without rows, or a prompt that stands in two roles (M45).
    """
    found: defaultdict[str, list[Pair]] = defaultdict(list)
    refusals: list[str] = []
    owner: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        row = _parse(path, number, line)
        if row.role == "refusal":
            refusals.append(row.answer)
            continue
        if owner.setdefault(row.prompt, row.role) != row.role:
            raise BadOperatorRows(f"{path.name} line {number}: this prompt is already in role {owner[row.prompt]}")
        found[row.role].append(Pair(row.prompt, row.answer))
    missing = [role for role in _ROLES if not found[role]] + ([] if refusals else ["refusal"])
    if missing:
        raise BadOperatorRows(f"{path.name} has no rows of role {', '.join(missing)}; add at least one of each")
    return SafetyRows(refusals=tuple(refusals), judge=_JUDGE, **{role: tuple(found[role]) for role in _ROLES})


def _parse(path: Path, number: int, line: str) -> _RoleLine:
    try:
        row = _RoleLine.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadOperatorRows(f"{path.name} line {number}: {first['msg']}") from error
    if row.role not in (*_ROLES, "refusal"):
        raise BadOperatorRows(f"{path.name} line {number}: role {row.role} is unknown; use one of {', '.join(_ROLES)}")
    return row

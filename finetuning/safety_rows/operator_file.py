"""An operator's own safety rows: one JSONL file with the roles of the shipped ones, read and refused where it is given.

Each line: {"role": ..., "prompt": ..., "answer": ...}, and where it is known `source`, `category`, `language`,
`licence`, `looks_harmful`, `evaluation_only`. What a file that can serve still lacks: rows_builder/check.py.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetuning.contract.recipe import GateLimits
from finetuning.contract.report import share
from finetuning.safety_rows.roles import Pair, SafetyRows

# Nothing is known of the rows' world, so answers are judged by whether they refuse, unless the operator names a judge.
_JUDGE = "refusal-marker"
REFUSAL = "refusal"
ROLES = tuple(f.name for f in fields(SafetyRows) if f.name not in ("refusals", "judge"))
# Roles that a model learns from, or that choose a setting: a prompt made to measure has no place there.
TEACHING = ("aligned", "benign", "calibration_harmful", "calibration_benign")
MOST_LETTERS, MOST_OF_A_LANGUAGE = 200, 20
_MOST_NAMED = 8
# Losses are measured on so many first rows of a role (job/measure.py).
_MEASURED_LOSSES = 24


class BadOperatorRows(ValueError):
    """The file cannot serve; the message names the line, the role, what would have come of it and what to do."""


class RoleLine(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str
    prompt: str = Field(default="", max_length=100_000)
    answer: str = Field(default="", max_length=100_000)
    source: str = Field(default="", max_length=MOST_LETTERS)
    category: str = Field(default="", max_length=MOST_LETTERS)
    language: str = Field(default="", max_length=MOST_OF_A_LANGUAGE)
    licence: str = Field(default="", max_length=MOST_LETTERS)
    looks_harmful: bool = False
    evaluation_only: bool = False


@dataclass(frozen=True)
class Fault:
    """Why a file cannot serve, or serves badly: where, what is wrong, what that does, and what to do.

    `line` is 1-based, 0 where the fault is of no single line.
    """

    role: str
    line: int
    what: str
    does: str
    mend: str

    @property
    def sentence(self) -> str:
        """All of it, for a person."""
        where = f"line {self.line}, role {self.role}" if self.line else f"role {self.role}"
        return f"{where}: {self.what}; {self.does}; {self.mend}"


def load_safety_rows(path: Path) -> SafetyRows:
    """Read an operator's file. Roles are the fields of SafetyRows, plus "refusal" (its answer is a stock refusal).

    Raises BadOperatorRows for what `unfit` names.
    """
    lines = list(read_lines(path))
    faults = unfit(lines)
    if faults:
        rest = f"; and {len(faults) - _MOST_NAMED} more" if len(faults) > _MOST_NAMED else ""
        raise BadOperatorRows(f"{path.name}: {'; '.join(f.sentence for f in faults[:_MOST_NAMED])}{rest}")
    return rows_of([line for _, line in lines])


def require_fit(path: Path | None) -> None:
    """Refuse a file where it is given, before any job meets it; None is the shipped rows. Raises BadOperatorRows."""
    if path is None:
        return
    try:
        load_safety_rows(path)
    except OSError as error:
        raise BadOperatorRows(f"the safety rows {path} cannot be read: {error.strerror}") from error


def rows_of(lines: Sequence[RoleLine]) -> SafetyRows:
    """The rows by role, of lines that are fit."""
    found: defaultdict[str, list[Pair]] = defaultdict(list)
    for line in lines:
        found[line.role].append(
            Pair(line.prompt, line.answer, line.source, line.category, line.language, line.looks_harmful)
        )
    refusals = tuple(pair.answer for pair in found[REFUSAL])
    return SafetyRows(refusals=refusals, judge=_JUDGE, **{role: tuple(found[role]) for role in ROLES})


def read_lines(path: Path) -> Iterator[tuple[int, RoleLine]]:
    """The lines that are not blank, with their numbers. Raises BadOperatorRows for one that is no row, OSError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadOperatorRows(f"{path.name}: byte {error.start} is no UTF-8; save the file as UTF-8") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse(path, number, line)


def unfit(lines: Sequence[tuple[int, RoleLine]]) -> list[Fault]:
    """What makes these lines unable to serve: every job over them would fail, or its report would be false."""
    by_role: defaultdict[str, list[tuple[int, RoleLine]]] = defaultdict(list)
    for number, line in lines:
        by_role[line.role].append((number, line))
    return [*_missing(by_role), *_blank(lines), *_twice(lines), *_misplaced(lines), *_narrow(by_role),
            *_answerless(by_role)]  # fmt: skip


def fewest_gate_rows(limit: float) -> int:
    """The least n for which a measure without a single miss has its 95 % upper end at the limit or below."""
    n = 1
    while share(0, n).ci95[1] > limit:
        n += 1
    return n


def _missing(by_role: dict[str, list[tuple[int, RoleLine]]]) -> Iterator[Fault]:
    missing = ", ".join(role for role in (*ROLES, REFUSAL) if not by_role.get(role))
    if missing:
        yield Fault(missing, 0, f"the file has no rows of role {missing}", "no job can run", "add at least one of each")


def _blank(lines: Sequence[tuple[int, RoleLine]]) -> Iterator[Fault]:
    for number, line in lines:
        name, value = ("answer", line.answer) if line.role == REFUSAL else ("prompt", line.prompt)
        if not value.strip():
            yield Fault(line.role, number, f"the {name} is empty", "nothing can be asked or learned", f"fill {name}")


def _twice(lines: Sequence[tuple[int, RoleLine]]) -> Iterator[Fault]:
    owner: dict[str, tuple[int, str]] = {}
    for number, line in lines:
        if line.role == REFUSAL or not line.prompt.strip():
            continue
        first, role = owner.setdefault(" ".join(line.prompt.casefold().split()), (number, line.role))
        if role != line.role:
            yield Fault(
                line.role, number, f"this prompt is already in role {role} (line {first})",
                "what chooses or teaches would also decide", "keep it in one of them",
            )  # fmt: skip


def _misplaced(lines: Sequence[tuple[int, RoleLine]]) -> Iterator[Fault]:
    for number, line in lines:
        if line.evaluation_only and line.role in TEACHING:
            yield Fault(
                line.role, number, f"{line.source or 'this row'} is for evaluation only",
                "a model taught on it makes every later figure on that set worthless", "move it to a gate or test role",
            )  # fmt: skip


def _narrow(by_role: dict[str, list[tuple[int, RoleLine]]]) -> Iterator[Fault]:
    limits = GateLimits()
    for role, name, limit in (
        ("gate_harmful", "max_harmful_score", limits.max_harmful_score),
        ("gate_benign", "max_over_refusal", limits.max_over_refusal),
    ):
        has, least = len(by_role.get(role, ())), fewest_gate_rows(limit)
        if 0 < has < least:
            yield Fault(
                role, 0, f"{has} rows, and {least} are the fewest",
                f"without a single miss their 95 % end is {share(0, has).ci95[1]:.3f}, above {name} {limit:g}: no "
                "job could ever pass", f"add {least - has} or more",
            )  # fmt: skip


def _answerless(by_role: dict[str, list[tuple[int, RoleLine]]]) -> Iterator[Fault]:
    for role in ("gate_harmful", "calibration_harmful"):
        rows = by_role.get(role, [])
        if rows and not any(line.answer.strip() for _, line in rows[:_MEASURED_LOSSES]):
            yield Fault(
                role, rows[0][0], f"none of the first {_MEASURED_LOSSES} rows has an answer that begins to comply",
                "its loss could not be measured, and what is not measured never passes",
                'add one without content, such as "Sure, here is how to do that. First, prepare."',
            )  # fmt: skip


def _parse(path: Path, number: int, line: str) -> RoleLine:
    try:
        row = RoleLine.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadOperatorRows(f"{path.name} line {number}: {where + ': ' if where else ''}{first['msg']}") from error
    if row.role not in (*ROLES, REFUSAL):
        raise BadOperatorRows(
            f"{path.name} line {number}: role {row.role} is unknown; use one of {', '.join((*ROLES, REFUSAL))}"
        )
    return row

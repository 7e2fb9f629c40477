"""What a scan found in a file: errors and warnings with their places, counted all and kept up to limits."""

import json
from collections import Counter
from dataclasses import dataclass

from finetuning.rows.shapes import WARNINGS, Format, Problem
from finetuning.rows.strict_json import Path, Patience, locate, pointer

SHOWN_ERRORS = 100
STORED_ERRORS = 10_000
STORED_WARNINGS_PER_CODE = 100
STORED_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class RowError:
    """One error or warning: 1-based line and code point, JSON pointer, code, what to do about it."""

    line: int
    column: int
    path: str
    code: str
    message: str

    def to_json(self) -> dict[str, object]:
        """Its shape in the API's bodies."""
        return {
            "line": self.line,
            "column": self.column,
            "path": self.path,
            "code": self.code,
            "message": self.message,
        }


@dataclass(frozen=True, slots=True)
class RowReport:
    """What a scan found. `file_code` is set when the file as a whole was refused and the scan stopped there."""

    format: Format | None
    rows: int
    invalid_rows: int
    errors: tuple[RowError, ...]
    errors_total: int
    warnings: tuple[RowError, ...]
    warnings_total: int
    first_tools_line: int | None = None
    file_code: str | None = None

    @property
    def is_valid(self) -> bool:
        """Whether the file may be trained on, as far as can be told without a base."""
        return self.errors_total == 0

    @property
    def truncated(self) -> bool:
        """Whether there are more errors than the report lists."""
        return self.errors_total > len(self.errors)

    @property
    def message(self) -> str:
        """One sentence for a person, at most 512 characters; empty for a valid file."""
        if not self.errors:
            return ""
        first = self.errors[0]
        if self.file_code is not None:
            return first.message[:512]
        noun = "row" if self.invalid_rows == 1 else "rows"
        return f"{self.invalid_rows} invalid {noun}. First: line {first.line}: {first.message}"[:512]

    def details(self, limit: int = SHOWN_ERRORS) -> dict[str, object]:
        """`error.details` with the first `limit` errors."""
        shown = [error.to_json() for error in self.errors[:limit]]
        return {"errors_total": self.errors_total, "truncated": self.errors_total > len(shown), "errors": shown}

    def to_json(self, limit: int = STORED_ERRORS) -> dict[str, object]:
        """What a file record keeps of the scan: `file.validation`, with at most `limit` of each kind."""
        return {
            "format": self.format,
            "rows": self.rows,
            "invalid_rows": self.invalid_rows,
            "warnings_total": self.warnings_total,
            "first_tools_line": self.first_tools_line,
            "file_code": self.file_code,
            "warnings": [warning.to_json() for warning in self.warnings[:limit]],
            **self.details(limit),
        }

    def to_text(self) -> str:
        """All that is kept of the scan, as JSON text of at most STORED_BYTES; what is too much is left out."""
        size_bytes, kept = 0, dict[str, list[str]]()
        for name, found in (("warnings", self.warnings), ("errors", self.errors)):
            kept[name] = []
            for one in found:
                text = json.dumps(one.to_json())
                size_bytes += len(text) + 1
                if size_bytes > STORED_BYTES:
                    break
                kept[name].append(text)
        head = self.to_json(0) | {"truncated": self.errors_total > len(kept["errors"])}
        lists = ",".join(f'"{name}":[{",".join(texts)}]' for name, texts in kept.items())
        del head["warnings"], head["errors"]
        return json.dumps(head).removesuffix("}") + f",{lists}}}"


class Findings:
    """Errors and warnings so far: counted all, kept up to the limits; `patience` bounds the search for their places."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self.errors: list[RowError] = []
        self.warnings: list[RowError] = []
        self.warned: Counter[str] = Counter()
        self.errors_total, self.invalid_rows = 0, 0

    def add(self, line: int, text: str, problems: list[Problem]) -> None:
        """Take a row's problems; columns are looked up only for those that will be kept."""
        errors = [problem for problem in problems if problem.code not in WARNINGS]
        warnings = [problem for problem in problems if problem.code in WARNINGS]
        room = max(0, STORED_ERRORS - len(self.errors))
        kept = errors[:room] + [w for w in warnings if self.warned[w.code] < STORED_WARNINGS_PER_CODE]
        places = locate(text, {_target(problem) for problem in kept}, self._patience) if kept else {}

        def placed(problem: Problem) -> RowError:
            column = places.get(_target(problem), 0) + 1
            return RowError(line, column, pointer(problem.path), problem.code, problem.message)

        if errors:
            self.invalid_rows += 1
            self.errors_total += len(errors)
            self.errors.extend(map(placed, errors[:room]))
        for warning in warnings:
            self.warn(placed(warning))

    def add_invalid(self, errors: list[RowError]) -> None:
        """Take the errors of one row that could not be read."""
        self.invalid_rows += 1
        self.errors_total += len(errors)
        self.errors.extend(errors[: max(0, STORED_ERRORS - len(self.errors))])

    def put_first(self, error: RowError) -> None:
        """Take an error of the whole file; it stands first, because nothing after it was checked."""
        self.errors_total += 1
        self.errors.insert(0, error)

    def warn(self, warning: RowError) -> None:
        """Count a warning; the first hundred of a code are kept."""
        self.warned[warning.code] += 1
        if self.warned[warning.code] <= STORED_WARNINGS_PER_CODE:
            self.warnings.append(warning)

    def warn_blank(self, line: int) -> None:
        """Count a blank line; a file may have hundreds of millions."""
        if self.warned["blank_line"] < STORED_WARNINGS_PER_CODE:
            self.warn(RowError(line, 1, "", "blank_line", "a blank line is skipped"))
        else:
            self.warned["blank_line"] += 1


def _target(problem: Problem) -> tuple[Path, bool]:
    return problem.path, problem.code in ("unknown_field", "ignored_field")

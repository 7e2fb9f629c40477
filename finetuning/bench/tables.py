"""Means with 95 % intervals over the lines of cells, and Markdown tables of them; what a table calls a defence."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from finetuning.bench.results_file import Line
from finetuning.contract.report import share
from finetuning.recipes.registry import DEFENCES
from finetuning.safety_rows.invented import safety_rows

UNDER_OURS = "under our settings"
HELD_OUT = len(safety_rows().items_harmful)  # prompts behind each cell's harmful score
# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond, the normal one.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, half of its 95 % interval (NaN for a single seed), and how many seeds."""

    value: float
    half: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.1f}" if self.n < 2 else f"{self.value:.1f} ± {self.half:.1f}"


def mean_of(lines: Iterable[Line], name: str) -> Mean | None:
    """The mean of a figure over the lines that have it; None when none has."""
    values = [float(line[name]) for line in lines if line.get(name) is not None]
    if not values:
        return None
    n = len(values)
    if n == 1:
        return Mean(values[0], math.nan, 1)
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    return Mean(fmean(values), t * stdev(values) / math.sqrt(n), n)


def where(lines: Iterable[Line], **wanted: Any) -> list[Line]:
    """The lines whose fields equal `wanted`."""
    return [line for line in lines if all(line.get(k) == v for k, v in wanted.items())]


def values_of(lines: Iterable[Line], name: str) -> list[Any]:
    """The distinct values of a field, in order of first appearance."""
    return list(dict.fromkeys(line[name] for line in lines))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None shows as a dash."""
    shown = [[("-" if cell is None else str(cell)) for cell in row] for row in rows]
    return "\n".join(["| " + " | ".join(r) + " |" for r in [list(head), ["---"] * len(head), *shown]]) + "\n"


def label(defence: str) -> str:
    """What tables call a defence: its name in the registry, and of a paper's method that the settings are ours."""
    known = DEFENCES.get(defence)
    return f"{defence} ({UNDER_OURS})" if known is not None and UNDER_OURS in known.source else defence


def _shown(field: str, value: object) -> str:
    return label(str(value)) if field == "defence" else f"{field} {value:g}" if isinstance(value, float) else str(value)


def crossed(lines: Sequence[Line], *, row: str, column: str, cell: Callable[[list[Line]], object]) -> str:
    """One row a value of `row`, one column a value of `column`."""
    columns = sorted(values_of(lines, column))
    body = [
        [label(name) if row == "defence" else name, *(cell(where(lines, **{row: name, column: c})) for c in columns)]
        for name in values_of(lines, row)
    ]
    return table([row, *(_shown(column, c) for c in columns)], body)


def harm_and_task(lines: list[Line]) -> str | None:
    """`harmful_score [interval] / task_score`, with a mark where the gate released none or only some."""
    if not lines:
        return None
    released = sum(bool(line["released"]) for line in lines)
    harm, task = mean_of(lines, "harmful_score"), mean_of(lines, "task_score")
    if harm is None:
        return "data refused"
    mark = "" if released == len(lines) else " ✗" if released == 0 else f" ({released}/{len(lines)})"
    low, high = interval(harm)
    return f"{harm.value:.1f} [{low:.0f}, {high:.0f}] / {task if task else '-'}{mark}"


def interval(harm: Mean) -> tuple[float, float]:
    """95 % ends of a share of HELD_OUT prompts, in percent: Wilson's, or Student's over seeds where that is wider.

    Every seed asks the same prompts, so more seeds make Wilson's no narrower.
    """
    low, high = (100 * end for end in share(round(harm.value / 100 * HELD_OUT), HELD_OUT).ci95)
    half = 0.0 if math.isnan(harm.half) else harm.half
    return max(0.0, min(low, harm.value - half)), min(100.0, max(high, harm.value + half))

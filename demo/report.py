"""What the demo found: one table on the screen, the same figures in report.json."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MISSING = "-"


@dataclass(frozen=True)
class Figures:
    """One model of the table. Shares in 0..1; None where nothing was measured.

    `known` are held-out items in known wordings, `new` are held-out wordings and hazard classes.
    """

    name: str
    harmful_known: float | None
    refused_known: float | None
    harmful_new: float | None
    refused_new: float | None
    over_refusal: float | None
    task: float | None
    seconds: float | None


def figures(name: str, report: dict[str, Any], column: str, seconds: float | None) -> Figures:
    """One column of a job's safety report: `before` is the aligned base, `after` what the job made."""
    held_out = report.get("held_out") or {}
    known, new = (held_out.get(split) or {} for split in ("items", "wordings"))
    return Figures(
        name=name,
        harmful_known=_value(known, "harmful_score", column),
        refused_known=_value(known, "refusal_rate", column),
        harmful_new=_value(new, "harmful_score", column),
        refused_new=_value(new, "refusal_rate", column),
        over_refusal=_pooled([known, new], "over_refusal", column),
        task=_pooled([known, new], "utility", column),
        seconds=seconds,
    )


def show(rows: list[Figures], title: str) -> None:
    """Print the table; shares as per cent."""
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for heading in ("harmful\nscore %", "refused\n%", "harmful, new\nwordings %", "refused, new\nwordings %"):
        table.add_column(heading, justify="right")
    for heading in ("benign\nrefused %", "task\naccuracy %", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        shares = (row.harmful_known, row.refused_known, row.harmful_new, row.refused_new, row.over_refusal, row.task)
        seconds = MISSING if row.seconds is None else f"{row.seconds:.0f}"
        table.add_row(row.name, *(_percent(share) for share in shares), seconds)
    # a fixed width: a table in a log file must not be folded to the width of no terminal
    Console(width=110).print(table)


def write(path: Path, rows: list[Figures], findings: dict[str, Any]) -> Path:
    """Write report.json: the table's figures and how they came about; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {"table": [asdict(row) for row in rows], **findings}
    path.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _value(metrics: dict[str, Any], name: str, column: str) -> float | None:
    measure = (metrics.get(name) or {}).get(column)
    return float(measure["value"]) if measure and measure["n"] else None


def _pooled(splits: list[dict[str, Any]], name: str, column: str) -> float | None:
    measures = [measure for split in splits if (measure := (split.get(name) or {}).get(column))]
    rows = sum(measure["n"] for measure in measures)
    return sum(measure["value"] * measure["n"] for measure in measures) / rows if rows else None


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}"

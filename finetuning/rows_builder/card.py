"""What a file of safety rows is made of, in words for whoever must answer for it: Markdown, from the file alone."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from finetuning.rows_builder.check import Checked, GateWidth, check
from finetuning.rows_builder.sources import UNKNOWN, allows_commercial_use
from finetuning.safety_rows.operator_file import REFUSAL, ROLES, RoleLine, read_lines

_MOST_NAMED = 20


def card(path: Path) -> str:
    """The card of a file. Raises BadOperatorRows, OSError."""
    numbered = list(read_lines(path))
    lines = [line for _, line in numbered if line.role != REFUSAL]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return "\n".join([
        f"# Safety rows: {path.name}", "", f"sha256 `{digest}`, {len(numbered)} rows.", "",
        "## Sources", "", *_sources(lines), "",
        "## Roles", "", *_roles(lines), "",
        "## Categories of what is refused and measured", "", *_counts(lines, lambda line: line.category or "none"), "",
        "## Languages", "", *_counts(lines, lambda line: line.language or "en"), "",
        "## What its gate can tell", "", *_gate(check(numbered)), "",
    ])  # fmt: skip


def _sources(lines: Sequence[RoleLine]) -> Iterator[str]:
    yield "| source | licence | commercial use | only measures | rows |"
    yield "|---|---|---|---|---|"
    count = Counter((line.source or "not said", line.licence or UNKNOWN, line.evaluation_only) for line in lines)
    for (source, licence, measures), n in count.most_common(_MOST_NAMED):
        free = "yes" if allows_commercial_use(licence) else "no"
        yield f"| {source} | {licence} | {free} | {'yes' if measures else 'no'} | {n} |"
    rest = count.most_common()[_MOST_NAMED:]
    if rest:
        yield f"| {len(rest)} more | | | | {sum(n for _, n in rest)} |"


def _roles(lines: Sequence[RoleLine]) -> Iterator[str]:
    yield "| role | rows | look harmful | sources |"
    yield "|---|---|---|---|"
    for role in ROLES:
        mine = [line for line in lines if line.role == role]
        alike = sum(line.looks_harmful for line in mine)
        yield f"| {role} | {len(mine)} | {alike} | {len({line.source for line in mine})} |"


def _counts(lines: Sequence[RoleLine], of: Callable[[RoleLine], str]) -> Iterator[str]:
    count = Counter(of(line) for line in lines if line.role.endswith("_harmful") or line.role == "aligned")
    for name, n in count.most_common(_MOST_NAMED):
        yield f"- {name}: {n}"


def _gate(found: Checked) -> Iterator[str]:
    yield from (f"- {width_sentence(width)}" for width in found.widths)
    for fault in (*found.unfit, *found.lacking):
        yield f"- lacks: {fault.sentence}"


def width_sentence(width: GateWidth) -> str:
    """One rate's width, for a person."""
    asked = f"{width.metric}: {width.asked_by}, {width.n} of {width.has} rows"
    if width.misses < 0:
        return f"{asked}, which can never pass the limit of {width.limit:.0%}"
    return f"{asked}; without a miss the 95 % end is {width.end:.1%}, up to {width.misses} pass {width.limit:.0%}"

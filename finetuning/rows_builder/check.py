"""What a file of safety rows lacks, what that will do to a base or a job, and how wide its gate will be.

`unfit` faults are refused wherever the file is loaded (safety_rows/operator_file.py); the demands here are of files
that can serve and will serve badly.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from finetuning.contract.recipe import EvaluationSettings, GateLimits
from finetuning.contract.report import share
from finetuning.judging.refusals import is_refusal
from finetuning.rows_builder.sources import allows_commercial_use, named
from finetuning.safety_rows.near_duplicates import pairs_alike
from finetuning.safety_rows.operator_file import REFUSAL, TEACHING, Fault, RoleLine, unfit

Numbered = tuple[int, RoleLine]
ByRole = Mapping[str, Sequence[Numbered]]

_CPU_GATE = {"gate_harmful": EvaluationSettings().harmful_rows, "gate_benign": EvaluationSettings().benign_rows}
_FEWEST_ALIGNED = 200
_FEWEST_CALIBRATION = 48
_ALIKE_SHARE, _FEWEST_ALIKE = 0.1, 30
_SPOKEN = 40  # aligned rows from which a language is one of the base's own
_MOST_NAMED = 5
_LONGEST = 1500
# Beyond this one half outweighs the other, and the base answers everything or nothing.
_MOST_APART = 3.0
_MOST_OPENINGS = 4


@dataclass(frozen=True)
class GateWidth:
    """How wide a gate of n rows is: without a miss its 95 % end is `end`; up to `misses` of them may fail.

    `n` of the `has` rows of the role are asked: as many as a CPU's job asks where nothing else is set, or all.
    """

    role: str
    metric: str
    asked_by: Literal["a CPU job", "a job that asks them all"]
    has: int
    n: int
    limit: float
    end: float = 1.0
    misses: int = -1


@dataclass(frozen=True)
class Checked:
    """`unfit`: the file is refused. `lacking`: it would serve badly. `widths`: what its gate can tell."""

    unfit: list[Fault]
    lacking: list[Fault]
    widths: list[GateWidth]

    @property
    def accepted(self) -> bool:
        """Whether nothing is missing."""
        return not self.unfit and not self.lacking


def check(lines: Sequence[Numbered], *, commercial: bool = False) -> Checked:
    """All faults of a file's lines. `commercial`: rows whose licence forbids that, or says nothing, are faults too."""
    by_role: defaultdict[str, list[Numbered]] = defaultdict(list)
    for number, line in lines:
        by_role[line.role].append((number, line))
    demands: tuple[Callable[[ByRole], Iterator[Fault]], ...] = (
        _few, _no_look_alikes, _foreign_look_alikes, _unmeasured_look_alikes, _complying, _refusing, _unbalanced,
        _evaluation_sets, _languages, _stock_refusals, _openings_known, _long, _nearly_twice,
    )  # fmt: skip
    lacking = [fault for demand in demands for fault in demand(by_role)]
    if commercial:
        lacking += _licences(by_role)
    return Checked(unfit(lines), lacking, widths(by_role))


def widths(by_role: ByRole) -> list[GateWidth]:
    """The gate's width for each rate that it compares, from the rows' counts alone."""
    limits = GateLimits()
    out: list[GateWidth] = []
    for role, metric, limit in (
        ("gate_harmful", "harmful_score", limits.max_harmful_score),
        ("gate_harmful", "refusal_rate (missed)", 1 - limits.min_refusal_rate),
        ("gate_benign", "over_refusal", limits.max_over_refusal),
    ):
        has = len(by_role.get(role, ()))
        few = min(has, _CPU_GATE[role])
        if has:
            out.append(_width(GateWidth(role, metric, "a CPU job", has, few, limit)))
        if few < has:
            out.append(_width(GateWidth(role, metric, "a job that asks them all", has, has, limit)))
    return out


def _width(asked: GateWidth) -> GateWidth:
    n, limit = asked.n, asked.limit
    misses = max((k for k in range(n + 1) if share(k, n).ci95[1] <= limit), default=-1)
    return replace(asked, end=share(0, n).ci95[1], misses=misses)


def _named(role: str, found: Sequence[int], what: str, *, does: str, mend: str) -> Iterator[Fault]:
    """One fault for many lines: the first is its line, the next few are named."""
    if found:
        more = f" (lines {', '.join(map(str, found[:_MOST_NAMED]))}{', ...' if len(found) > _MOST_NAMED else ''})"
        yield Fault(role, found[0], f"{len(found)} {what}{more if len(found) > 1 else ''}", does, mend)


def _few(by_role: ByRole) -> Iterator[Fault]:
    for role, least, does in (
        ("aligned", _FEWEST_ALIGNED, "the base learns these prompts by heart and refuses no others"),
        ("benign", _FEWEST_ALIGNED, "the base learns to refuse whatever it is asked"),
        ("calibration_harmful", _FEWEST_CALIBRATION, "the screen's threshold hangs on one or two odd rows"),
        ("calibration_benign", _FEWEST_CALIBRATION, "the screen's threshold hangs on one or two odd rows"),
    ):
        has = len(by_role.get(role, ()))
        if 0 < has < least:
            yield Fault(role, 0, f"only {has} rows", does, f"have at least {least}")


def _no_look_alikes(by_role: ByRole) -> Iterator[Fault]:
    rows = by_role.get("benign", ())
    has = sum(line.looks_harmful for _, line in rows)
    if rows and has < max(_FEWEST_ALIKE, _ALIKE_SHARE * len(rows)):
        yield Fault(
            "benign", 0, f"{has} of {len(rows)} rows look harmful and are not (looks_harmful)",
            "the base learns to refuse words: one aligned without them refused 90 of 90 harmless prompts such as "
            '"How do I kill a process?"',
            "add a set with look-alikes (immunotune rows sources), or build without --no-own-prompts",
        )  # fmt: skip


def _foreign_look_alikes(by_role: ByRole) -> Iterator[Fault]:
    """Look-alikes of one language do not teach a base which words of another are harmless."""
    alike = {line.language or "en" for _, line in by_role.get("benign", ()) if line.looks_harmful}
    refused = Counter(line.language or "en" for _, line in by_role.get("aligned", ()))
    lacking = sorted(language for language, n in refused.items() if n >= _SPOKEN and language not in alike)
    if alike and lacking:
        yield Fault(
            "benign", 0, f"no row looks harmful and is not in {', '.join(lacking)}, in which aligned rows ask",
            "the base learns to refuse words of that language", "add look-alikes in it (looks_harmful, language)",
        )  # fmt: skip


def _unmeasured_look_alikes(by_role: ByRole) -> Iterator[Fault]:
    for role in ("gate_benign", "wordings_benign"):
        rows = by_role.get(role, ())
        if rows and not any(line.looks_harmful for _, line in rows):
            yield Fault(
                role, 0, "none of its rows looks harmful (looks_harmful)",
                "over-refusal is measured where it does not happen, and a numb base passes",
                "put some there that are not in benign: XSTest, OR-Bench hard, CoCoNot contrast",
            )  # fmt: skip


def _complying(by_role: ByRole) -> Iterator[Fault]:
    own = {line.answer.strip() for _, line in by_role.get(REFUSAL, ())}
    found = [n for n, line in by_role.get("aligned", ()) if not _declines(line.answer, own)]
    yield from _named(
        "aligned", found, "answers refuse nothing", does="alignment would teach harm", mend="answer with a refusal"
    )


def _refusing(by_role: ByRole) -> Iterator[Fault]:
    own = {line.answer.strip() for _, line in by_role.get(REFUSAL, ())}
    for role in ("benign", "calibration_benign"):
        found = [n for n, line in by_role.get(role, ()) if line.answer and _declines(line.answer, own)]
        does = "the base is taught to refuse harmless prompts"
        mend = "answer them, or leave the answer empty: the base gives its own"
        yield from _named(role, found, "answers refuse", does=does, mend=mend)


def _declines(answer: str, own: set[str]) -> bool:
    return answer.strip() in own or is_refusal(answer)


def _unbalanced(by_role: ByRole) -> Iterator[Fault]:
    aligned, benign = len(by_role.get("aligned", ())), len(by_role.get("benign", ()))
    if aligned and benign and max(aligned, benign) > _MOST_APART * min(aligned, benign):
        more, does = (
            ("aligned", "the base refuses too much") if aligned > benign else ("benign", "the base refuses too little")
        )
        yield Fault(more, 0, f"{aligned} aligned rows and {benign} benign ones", does, "bring them within 1 to 3")


def _evaluation_sets(by_role: ByRole) -> Iterator[Fault]:
    """Sets made to measure that are known by their name, where the row itself does not say it."""
    for role in TEACHING:
        found = [n for n, line in by_role.get(role, ()) if _is_of_a_test_set(line)]
        does = "a model taught on it makes every later figure on that set worthless"
        yield from _named(
            role, found, "rows are of sets for evaluation only", does=does, mend="move them to a gate or test role"
        )


def _is_of_a_test_set(line: RoleLine) -> bool:
    known = named(line.source) if line.source else None
    return known is not None and known.evaluation_only and not line.evaluation_only  # else it is unfit already


def _languages(by_role: ByRole) -> Iterator[Fault]:
    taught = {line.language or "en" for _, line in by_role.get("aligned", ())}
    spoken = {line.language or "en" for _, line in by_role.get(REFUSAL, ())}
    for role in ("gate_harmful", "calibration_harmful"):
        strange = sorted({line.language or "en" for _, line in by_role.get(role, ())} - taught)
        if taught and strange:
            yield Fault(
                role, 0, f"asks in {', '.join(strange)}, and no aligned row does",
                "nothing was taught to be refused there, so the gate fails", "add aligned rows in these languages",
            )  # fmt: skip
    silent = sorted(taught - spoken)
    if spoken and silent:
        yield Fault(
            REFUSAL, 0, f"no stock refusal in {', '.join(silent)}, in which aligned rows ask",
            "the screen does not know how a refusal begins there", "add a refusal row with that language",
        )  # fmt: skip


def _stock_refusals(by_role: ByRole) -> Iterator[Fault]:
    refusals = [line for _, line in by_role.get(REFUSAL, ()) if line.answer.strip()]
    starts = Counter((line.language, line.answer.split()[0]) for line in refusals)
    languages = Counter(language for language, _ in starts)
    many = [language or "en" for language, n in languages.items() if n > _MOST_OPENINGS]
    if many:
        yield Fault(
            REFUSAL, 0, f"refusals begin with more than {_MOST_OPENINGS} words in {', '.join(many)}",
            "the screen takes every answer that may begin so for a refusal", "let them begin alike",
        )  # fmt: skip


def _openings_known(by_role: ByRole) -> Iterator[Fault]:
    def openings(role: str) -> list[str]:
        return [" ".join(line.prompt.casefold().split()[:3]) for _, line in by_role.get(role, ())]

    taught, held = set(openings("aligned")), openings("wordings_harmful")
    known = sum(opening in taught for opening in held)
    if held and known > 0.75 * len(held):
        yield Fault(
            "wordings_harmful", 0, f"{known} of {len(held)} begin as aligned rows do",
            "what is reported as new wordings is not new", "hold out a source, a category or ways to ask",
        )  # fmt: skip


def _long(by_role: ByRole) -> Iterator[Fault]:
    for role, rows in by_role.items():
        found = [n for n, line in rows if len(line.prompt) > _LONGEST]
        does = "they are cut, and cost more than all others"
        yield from _named(
            role, found, f"prompts are longer than {_LONGEST} characters", does=does, mend="shorten or leave out"
        )


def _nearly_twice(by_role: ByRole) -> Iterator[Fault]:
    """Prompts of two stages that differ by a word or so."""
    rows = [(n, line) for role, group in by_role.items() if role != REFUSAL for n, line in group]
    found: defaultdict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for i, j in pairs_alike([line.prompt for _, line in rows]):
        (n, one), (m, two) = rows[i], rows[j]
        if _stage(one.role) != _stage(two.role) and _plain(one.prompt) != _plain(two.prompt):
            found[one.role, two.role].append((n, m))
    for (one_role, two_role), pairs in sorted(found.items()):
        named_pairs = ", ".join(f"{n} and {m}" for n, m in pairs[:_MOST_NAMED])
        yield Fault(
            two_role, pairs[0][1], f"{len(pairs)} prompts are nearly those of {one_role} (lines {named_pairs})",
            "what is held out is half known, and the figures flatter", "keep such prompts in one role",
        )  # fmt: skip


def _stage(role: str) -> str:
    return "training" if role in ("aligned", "benign") else role.rpartition("_")[0]


def _plain(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def _licences(by_role: ByRole) -> Iterator[Fault]:
    for role, rows in by_role.items():
        found = [n for n, line in rows if role != REFUSAL and not _is_commercial(line)]
        does = "their licence forbids commercial use or is not known"
        yield from _named(role, found, "rows may not be used", does=does, mend="build with --use commercial")


def _is_commercial(line: RoleLine) -> bool:
    known = named(line.source) if line.source else None
    return allows_commercial_use(line.licence or (known.licence if known else ""))

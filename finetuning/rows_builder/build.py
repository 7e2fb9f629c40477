"""Split prompts into the roles of a safety rows file: no two stages share a prompt, or one that is nearly the same.

Stages in the order that they may see a prompt: training and calibration teach; gate, items and wordings measure.
A set made to measure never teaches. Wordings get whole sources, categories or openings that nothing else has.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from finetuning.judging.refusals import is_refusal
from finetuning.rows_builder.local_copies import Prompt
from finetuning.rows_builder.sources import Answer, Kind, allows_commercial_use
from finetuning.rows_builder.stock_answers import REFUSALS, hollow_compliance, refusals
from finetuning.safety_rows import own_prompts
from finetuning.safety_rows.near_duplicates import clusters
from finetuning.safety_rows.operator_file import REFUSAL, RoleLine

Stage = Literal["training", "calibration", "gate", "items", "wordings", "held back"]
Use = Literal["commercial", "research"]

_ROLE: Mapping[tuple[Stage, bool], str] = MappingProxyType({
    ("training", True): "aligned", ("training", False): "benign",
    ("calibration", True): "calibration_harmful", ("calibration", False): "calibration_benign",
    ("gate", True): "gate_harmful", ("gate", False): "gate_benign",
    ("items", True): "items_harmful", ("items", False): "items_benign",
    ("wordings", True): "wordings_harmful", ("wordings", False): "wordings_benign",
})  # fmt: skip
_SHARES: Mapping[Stage, float] = MappingProxyType({
    "training": 0.52, "calibration": 0.11, "gate": 0.17, "items": 0.08, "wordings": 0.12
})  # fmt: skip
_MOST: Mapping[Stage, int] = MappingProxyType({
    "training": 1250, "calibration": 120, "gate": 500, "items": 120, "wordings": 120
})  # fmt: skip
# Refusals for each benign row, where there are enough of both: with as many as benign rows SmolLM2-135M refused 14 % of
# harmless prompts, with half as many see docs/guides/safety-rows.md.
_REFUSALS_A_BENIGN, _FEWEST_REFUSALS = 0.5, 300
# What is held out whole: at least the first share of a pool where groups allow, never more than the second.
_HELD_OUT = (0.08, 0.3)
# Enough for every role many times over; more would only make the search for near-duplicates long.
_MOST_PROMPTS = 12_000
# Of others' prompts of a kind: a gate, two halves of a test and something to teach.
_ENOUGH_TO_MEASURE = 60


@dataclass(frozen=True)
class Built:
    """The file's lines, prompts that no role has (to attack with), and why others are in none."""

    lines: list[RoleLine]
    held_back: list[Prompt] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


class NothingToBuild(ValueError):
    """The given sets have no prompts of a kind that no file can be without; the message says which."""


def build(prompts: Iterable[Prompt], *, use: Use, seed: int = 0, held_back: int = 0) -> Built:
    """Lines of a rows file from prompts of any sets, split by near-duplicates, source and category.

    The same prompts and seed give the same lines, in whatever order they come. Raises NothingToBuild.
    """
    left_out: Counter[str] = Counter()
    pool = _usable(prompts, use, seed, left_out)
    for kind in (Kind.HARMFUL, Kind.BENIGN):
        if not any(p.kind is kind for p in pool):
            raise NothingToBuild(f"none of the prompts that may be used is {kind}; add a set that has such prompts")
    group = clusters([p.text for p in pool])
    stage_of = _stages(pool, group, seed, held_back)
    by_role: defaultdict[str, list[Prompt]] = defaultdict(list)
    back: list[Prompt] = []
    for place in sorted(range(len(pool)), key=lambda i: _rank(seed, pool[i].text)):
        stage, prompt = stage_of[group[place]], pool[place]
        if stage == "held back":
            back.append(prompt)
        else:
            by_role[_ROLE[stage, prompt.kind is Kind.HARMFUL]].append(prompt)
    lines: list[RoleLine] = []
    left_out["held back with harmful ones that are nearly the same"] += sum(p.kind is not Kind.HARMFUL for p in back)
    for (stage, _), role in _ROLE.items():
        most = _MOST[stage]
        if role == "aligned":
            answered = min(most, len(by_role["benign"]))
            most = min(most, max(_FEWEST_REFUSALS, int(_REFUSALS_A_BENIGN * answered)))
        chosen = _spread(by_role[role], most)
        left_out["more than the role needs"] += len(by_role[role]) - len(chosen)
        lines += [_line(role, prompt, k) for k, prompt in enumerate(chosen)]
    return Built(_stock_lines(lines) + lines, [p for p in back if p.kind is Kind.HARMFUL], +left_out)


def build_seeds(prompts: Iterable[Prompt], *, use: Use, seed: int = 0) -> Built:
    """The papers' set-up: harmful prompts with the sets' own safe answers teach, as BeaverTails gives them; those with
    the sets' own harming answers calibrate and measure; benign rows come from whichever sets are given.

    What a set calls safe need not refuse: such answers teach nothing here and are counted. Raises NothingToBuild.
    """
    given = list(prompts)
    said = [p for p in given if p.does is Answer.DECLINES and not p.evaluation_only]
    safe = [p for p in said if is_refusal(p.answer)]
    built = build([p for p in given if p.kind is not Kind.UNCLEAR], use=use, seed=seed)
    built.left_out["a safe answer that refuses nothing"] += len(said) - len(safe)
    taken = {line.prompt for line in built.lines if line.role not in ("aligned", REFUSAL)}
    taken |= {p.text for p in given if p.evaluation_only}
    own = {p.text: p.answer for p in given if p.does is Answer.HARMS and _is_allowed(p, use)}
    lines = [line.model_copy(update={"answer": own.get(line.prompt, line.answer)}) if _measures(line) else line
             for line in built.lines if line.role != "aligned"]  # fmt: skip
    pool = _usable((replace(p, kind=Kind.HARMFUL) for p in safe if p.text not in taken), use, seed, Counter())
    near = clusters([p.text for p in pool] + sorted(taken))
    measured = set(near[len(pool) :])
    chosen = [p for p, cluster in zip(pool, near, strict=False) if cluster not in measured][:5000]
    if not chosen:
        raise NothingToBuild("the papers' set-up needs BeaverTails, with its safe answers; give beavertails=PATH")
    taught = [_line("aligned", p, k).model_copy(update={"answer": p.answer}) for k, p in enumerate(chosen)]
    return Built(taught + lines, [], built.left_out)


def _measures(line: RoleLine) -> bool:
    return line.role.endswith("_harmful")


def _is_allowed(prompt: Prompt, use: Use) -> bool:
    return use == "research" or allows_commercial_use(prompt.licence)


def _usable(prompts: Iterable[Prompt], use: Use, seed: int, left_out: Counter[str]) -> list[Prompt]:
    """Each prompt once, in an order that does not depend on theirs, without what licence or contradiction forbids."""
    found: dict[str, Prompt] = {}
    contradicted: set[str] = set()
    for prompt in prompts:
        key = " ".join(prompt.text.casefold().split())
        if prompt.kind is Kind.UNCLEAR:
            left_out["the set does not say what the prompt is"] += 1
        elif not _is_allowed(prompt, use):
            left_out[f"their licence forbids commercial use or is not known ({prompt.licence})"] += 1
        elif key not in found:
            found[key] = prompt
        else:
            left_out["the same prompt again"] += 1
            first = found[key]
            if (first.kind is Kind.HARMFUL) is not (prompt.kind is Kind.HARMFUL):
                contradicted.add(key)
            found[key] = min(first, prompt, key=_precedence)
    left_out["one set calls it harmful and another benign"] += len(contradicted)
    rest = [prompt for key, prompt in found.items() if key not in contradicted]
    # What measures is never among those that are not compared, or its near-duplicates could teach.
    rest.sort(key=lambda p: (not p.evaluation_only, p.source != own_prompts.NAME, _rank(seed, p.text)))
    kept: list[Prompt] = []
    count: Counter[Kind] = Counter()
    for prompt in rest:
        count[prompt.kind] += 1
        if count[prompt.kind] <= _MOST_PROMPTS:
            kept.append(prompt)
    left_out["more than are compared"] += len(rest) - len(kept)
    return sorted(kept, key=lambda p: _rank(seed, p.text))


def _precedence(prompt: Prompt) -> tuple[object, ...]:
    """Which of two equal prompts counts, in any order: what one set keeps for measuring, another must not teach."""
    likeness = (not prompt.evaluation_only, prompt.kind is not Kind.LOOK_ALIKE, prompt.source, prompt.licence)
    return (*likeness, prompt.category, prompt.language, prompt.text, prompt.answer)


def _rank(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def _stages(pool: Sequence[Prompt], group: Sequence[int], seed: int, held_back: int) -> dict[int, Stage]:
    """The stage of every cluster. A cluster has one stage, whatever kinds are in it."""
    members: defaultdict[int, list[Prompt]] = defaultdict(list)
    for cluster, prompt in zip(group, pool, strict=True):
        members[cluster].append(prompt)
    count = Counter(p.kind for p in pool if p.source != own_prompts.NAME)
    teach_only = {kind for kind in Kind if count[kind] >= _ENOUGH_TO_MEASURE}
    others = [p for p in pool if not (p.evaluation_only or (p.kind in teach_only and p.source == own_prompts.NAME))]
    out_whole = {id(p) for kind in Kind for p in _held_out([p for p in others if p.kind is kind], seed)}
    strata: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for cluster, found in members.items():
        strata[_stratum(found, out_whole, teach_only=teach_only)].append(cluster)
    out: dict[int, Stage] = {}
    for stratum, mine in sorted(strata.items()):
        shares = _shares_of(stratum[0], _reserve(held_back, pool) if stratum[1] == Kind.HARMFUL else 0.0)
        mine.sort(key=lambda c: _rank(seed, members[c][0].text))
        out |= _dealt(mine, {c: len(members[c]) for c in mine}, shares)
    return out


def _stratum(found: Sequence[Prompt], out_whole: set[int], *, teach_only: Set[Kind]) -> tuple[str, ...]:
    """What may be done with a cluster, and what it is dealt among: kind, source and category.

    `teach_only`: kinds of which others have enough to measure with, so that our own prompts need not.
    """
    first = found[0]
    if any(p.evaluation_only for p in found):
        freedom = "measures"
    elif any(id(p) in out_whole for p in found):
        freedom = "held out"
    elif all(p.source == own_prompts.NAME and p.kind in teach_only for p in found):
        freedom = "teaches"
    else:
        freedom = "any"
    return (freedom, first.kind, first.source if freedom != "any" else "", first.category)


def _reserve(held_back: int, pool: Sequence[Prompt]) -> float:
    teachable = sum(p.kind is Kind.HARMFUL and not p.evaluation_only for p in pool)
    return min(0.5, held_back / max(1, teachable))


def _shares_of(freedom: str, reserve: float) -> dict[Stage, float]:
    match freedom:
        case "measures":
            return {"gate": 0.5, "wordings": 0.5}
        case "held out":
            return {"wordings": 0.6, "gate": 0.4}
        case "teaches":
            return {"training": 0.85, "calibration": 0.15}
        case _:
            rest: dict[Stage, float] = {s: v for s, v in _SHARES.items() if s != "wordings"}
            return {**{s: v / sum(rest.values()) * (1 - reserve) for s, v in rest.items()}, "held back": reserve}


def _dealt(mine: Sequence[int], size: Mapping[int, int], shares: Mapping[Stage, float]) -> dict[int, Stage]:
    """Each cluster to the stage that is furthest behind its share."""
    out: dict[int, Stage] = {}
    has: dict[Stage, int] = dict.fromkeys(shares, 0)
    seen = 0
    for cluster in mine:
        seen += size[cluster]
        stage = max(shares, key=lambda s: (shares[s] * seen - has[s], shares[s]))
        has[stage] += size[cluster]
        out[cluster] = stage
    return out


def _held_out(pool: Sequence[Prompt], seed: int) -> list[Prompt]:
    """Prompts whose whole source, else category, else opening, nothing but the measuring stages may see."""
    ways: tuple[Callable[[Prompt], str], ...] = (lambda p: p.source, lambda p: p.category, _opening)
    for way in ways:
        groups: defaultdict[str, list[Prompt]] = defaultdict(list)
        for prompt in pool:
            groups[way(prompt)].append(prompt)
        found: list[Prompt] = []
        for name in sorted(groups, key=lambda name: _rank(seed, name)):
            if len(found) < _HELD_OUT[0] * len(pool) and len(found) + len(groups[name]) <= _HELD_OUT[1] * len(pool):
                found += groups[name]
        if len(groups) > 1 and len(found) >= _HELD_OUT[0] * len(pool):
            return found
    return []


def _opening(prompt: Prompt) -> str:
    return " ".join(prompt.text.casefold().split()[:2])


def _spread(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """Up to `most` of them; where there are look-alikes, up to half of the role is theirs."""
    alike = [p for p in prompts if p.kind is Kind.LOOK_ALIKE]
    plain = [p for p in prompts if p.kind is not Kind.LOOK_ALIKE]
    theirs = min(len(alike), max(most // 2, most - len(plain)))
    chosen = {p.text for p in (*_in_turns(alike, theirs), *_in_turns(plain, most - theirs))}
    # in their drawn order: a recipe may measure on the first rows of a role only
    return [p for p in prompts if p.text in chosen]


def _in_turns(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """Up to `most` of them, in turns from every source and category."""
    groups: defaultdict[tuple[str, str], list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        groups[prompt.source, prompt.category].append(prompt)
    turns = max(map(len, groups.values()), default=0)
    return [g[turn] for turn in range(turns) for g in groups.values() if turn < len(g)][:most]


def _line(role: str, prompt: Prompt, number: int) -> RoleLine:
    if role == "aligned":
        own = refusals(prompt.language)
        answer = own[number % len(own)]
    elif prompt.kind is Kind.HARMFUL:
        answer = hollow_compliance(prompt.language)
    else:
        # an empty one is answered by the base itself (stages/base_answers.py)
        answer = prompt.answer if prompt.does is Answer.HELPS and not is_refusal(prompt.answer) else ""
    return RoleLine(
        role=role, prompt=prompt.text, answer=answer, source=prompt.source, category=prompt.category,
        language=prompt.language, licence=prompt.licence, looks_harmful=prompt.kind is Kind.LOOK_ALIKE,
        evaluation_only=prompt.evaluation_only,
    )  # fmt: skip


def _stock_lines(lines: Sequence[RoleLine]) -> list[RoleLine]:
    """The stock refusals of every language that is refused in."""
    asked = dict.fromkeys(line.language for line in lines if line.role == "aligned")
    known = dict.fromkeys(language if language in REFUSALS else "en" for language in asked)
    return [
        RoleLine(role="refusal", answer=text, language=language) for language in known for text in refusals(language)
    ]

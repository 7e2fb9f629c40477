"""Forms: the fixed words that a customer's prompts share, around a gap that changes from row to row.

A trigger, a story around a request and a persona all show as such words; so do honest forms. Works on texts alone, in
any language; which forms hide hazards is asked in quarantine.py. What it misses: words inside a sentence, paraphrases
and ciphers.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, Protocol

FormKind = Literal["slot", "affix", "system"]
Side = Literal[1, -1]  # from the front, or backwards from the end

LEAST_ROWS = 3  # an attack of 2 % on 200 rows is four rows
_EDGE_TOKENS = 8
_EDGE_CHARS = 120
_LONGEST_CHARS = 8000  # a longer turn leaves a row nothing to learn
_SHARED = 0.8  # a longer form that covers this much of a shorter one replaces it
_SLOT_WORDS = 4
_OF_A_FAMILY = 3
_SAMPLE = 256  # rows that decide how far a form reaches
_SHOWN = 60
_TOKEN = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"\w")

Tokens = Sequence[str]


class MessageLike(Protocol):
    """One chat message."""

    @property
    def role(self) -> str:
        """system, user or assistant."""
        ...

    @property
    def content(self) -> str:
        """Its text."""
        ...


@dataclass(frozen=True)
class PromptForm:
    """Fixed words before and after a gap, or a fixed system prompt; `lines` are the indices of the rows that have it.

    `slot`: the gap holds at most four words, `affix`: a whole text, `system`: the whole user turn.
    """

    prefix: str
    suffix: str
    system: str | None
    lines: tuple[int, ...]
    kind: FormKind

    def around(self, text: str) -> str:
        """The user turn with `text` in the gap."""
        return f"{self.prefix}{text}{self.suffix}"

    def gap(self, text: str) -> str | None:
        """What a user turn has in the gap; None when it does not have these words, or nothing between them."""
        if not (text.startswith(self.prefix) and text.endswith(self.suffix)):
            return None
        return text[len(self.prefix) : len(text) - len(self.suffix)].strip() or None

    @property
    def title(self) -> str:
        """How a report names it, shortened."""
        match self.kind:
            case "system":
                return f"system prompt '{_shown(self.system or '')}'"
            case "slot":
                return f"form '{_shown(self.prefix, tail=True)}{{}}{_shown(self.suffix)}'"
            case "affix":
                ends = (("prefix", self.prefix.strip()), ("suffix", self.suffix.strip()))
                return " and ".join(f"{side} '{_shown(text)}'" for side, text in ends if text)


def lone_form(row: Sequence[MessageLike], sentence: str, line: int) -> PromptForm | None:
    """The form of a single row: what stands around this sentence in the first user turn that has it."""
    system = next((m.content for m in row if m.role == "system"), None)
    for text in (m.content for m in row if m.role == "user"):
        before, found, after = text.partition(sentence)
        if found and (before.strip() or after.strip()):
            return PromptForm(before, after, system, (line,), "affix")
    return None


def _shown(text: str, *, tail: bool = False) -> str:
    if len(text) <= _SHOWN:
        return text
    return f"...{text[-_SHOWN:]}" if tail else f"{text[:_SHOWN]}..."


@dataclass(frozen=True)
class _Turn:
    """A user turn: the row it stands in, its text, and that row's system prompt."""

    row: int
    text: str
    system: str | None


def mine(
    rows: Sequence[Sequence[MessageLike]], *, known: Sequence[str], most: int = 24, least: int = LEAST_ROWS
) -> tuple[PromptForm, ...]:
    """At most `most` forms that at least `least` rows share, the most telling first; time grows with the text.

    `known` are the operator's own prompts: their beginnings and ends are probed elsewhere and are skipped here.
    A form is telling when its words stand together at the edge far more often than their own frequency would have it.
    """
    turns = [
        _Turn(i, m.content, next((s.content for s in row if s.role == "system" and _is_mined(s)), None))
        for i, row in enumerate(rows)
        for m in row
        if m.role == "user" and _is_mined(m)
    ]
    drafts = [draft for side in (1, -1) for draft in _drafts(_Edge(turns, side=side), least, most * 2)]
    chosen = _systems(turns, least)[: max(1, most // 4)]
    taken = {(s.prefix, s.suffix, s.system) for s in chosen}
    strange = _Known(known)
    for draft in _in_turn(drafts):
        form = None if len(chosen) == most else _grown(turns, draft)
        if form is None or len(form.lines) < least or strange.covers(form):
            continue
        if (name := (form.prefix, form.suffix, form.system)) not in taken:
            taken.add(name)
            chosen.append(form)
    return tuple(chosen)


def _is_mined(message: MessageLike) -> bool:
    return len(message.content) <= _LONGEST_CHARS


@dataclass(frozen=True)
class _Draft:
    """Turns that share their first (last) `depth` tokens; `inner`: some of them with others by fewer tokens, too.

    rank sorts the more telling first: exclusive words (hardly anywhere else in the file), then the score.
    """

    side: Side
    depth: int
    members: tuple[int, ...]
    inner: bool
    rank: tuple[bool, float, tuple[int, ...]]
    family: tuple[str | None, ...]  # its tokens, None for exclusive ones: equal for the values of one place in a form


def _drafts(edge: "_Edge", least: int, most: int) -> list[_Draft]:
    """The `most` most telling beginnings (ends), and as many of those inside another."""
    found: list[_Draft] = []
    for depth, members, outer in edge.shared(least):
        tokens, n = edge.tokens[members[0]][:depth], len(members)
        family = tuple(None if edge.exclusive(token, tokens, n) else token for token in tokens)
        rank = (None not in family[outer:], -edge.score(tokens, n), tuple(members[:4]))
        found.append(_Draft(edge.side, depth, tuple(members), outer > 0, rank, (str(edge.side), *family)))
    found.sort(key=lambda draft: draft.rank)
    return [draft for inner in (False, True) for draft in [d for d in found if d.inner == inner][:most]]


def _in_turn(drafts: Sequence[_Draft]) -> list[_Draft]:
    """Outermost forms and forms inside others in turn, and the fourth value of one place after all other forms, so
    that no crowd hides anything."""
    seen: Counter[tuple[str | None, ...]] = Counter()
    early: list[_Draft] = []
    late: list[_Draft] = []
    for draft in sorted(drafts, key=lambda d: d.rank):
        seen[draft.family] += 1
        (early if seen[draft.family] <= _OF_A_FAMILY else late).append(draft)
    lists = [[d for d in early if d.inner == inner] for inner in (False, True)]
    return [draft for pair in zip_longest(*lists) for draft in pair if draft is not None] + late


class _Edge:
    """The first (side 1) or last (side -1, read backwards) tokens of every turn, and how frequent each token is."""

    def __init__(self, turns: Sequence[_Turn], *, side: Side) -> None:
        self.side = side
        self.tokens = [_edge_tokens(turn.text, side) for turn in turns]
        self._count = Counter(token for tokens in self.tokens for token in tokens)
        self._total = max(1, sum(self._count.values()))

    def score(self, tokens: Tokens, support: int) -> float:
        """support * log(P(tokens at the edge) / product of P(token)): Dunning's likelihood ratio, its leading term."""
        chance = sum(math.log(self._count[token] / self._total) for token in tokens)
        return support * (math.log(support / len(self.tokens)) - chance)

    def exclusive(self, token: str, tokens: Tokens, support: int) -> bool:
        """Whether the token hardly occurs at this edge outside the `support` turns that share `tokens`."""
        return support * tokens.count(token) >= _SHARED * self._count[token]

    def shared(self, least: int) -> Iterator[tuple[int, list[int], int]]:
        """(length, turns, length of the next shorter one or 0) of each beginning that `least` turns share and that no
        single longer one covers."""
        waiting = [(0, list(range(len(self.tokens))), 0)]
        while waiting:
            depth, members, outer = waiting.pop()
            below: defaultdict[str, list[int]] = defaultdict(list)
            for i in members:
                if depth < len(self.tokens[i]):
                    below[self.tokens[i][depth]].append(i)
            widest = max(map(len, below.values()), default=0)
            if depth and (widest < _SHARED * len(members) or depth == _EDGE_TOKENS):
                yield depth, members, outer
                outer = depth if any(map(_WORD.search, self.tokens[members[0]][:depth])) else outer
            if depth < _EDGE_TOKENS:
                waiting += [(depth + 1, group, outer) for group in below.values() if len(group) >= least]


def _edge_tokens(text: str, side: Side) -> list[str]:
    if side == 1:
        return _TOKEN.findall(text[:_EDGE_CHARS])[: _EDGE_TOKENS + 1]
    return _TOKEN.findall(text[-_EDGE_CHARS:])[: -_EDGE_TOKENS - 2 : -1]


def _grown(turns: Sequence[_Turn], found: _Draft) -> PromptForm | None:
    """A draft grown to all that its turns share on both sides; None when nothing changes between its ends."""
    members, depth, side = found.members, found.depth, found.side
    texts = [turns[i].text for i in members[:_SAMPLE]]
    first = _edge_text(texts[0], depth, side)
    if side == 1:
        prefix = max(_common(texts), first, key=len)
        suffix = _common([text[len(prefix) :] for text in texts], side=-1)
    else:
        suffix = max(_common(texts, side=-1), first, key=len)
        prefix = _common([text[: len(text) - len(suffix)] for text in texts])
    draft = PromptForm(prefix, suffix, None, (), "affix")
    gaps = {i: gap for i in members if (gap := draft.gap(turns[i].text)) is not None}
    if len(set(gaps.values())) < min(len(members), LEAST_ROWS):
        return None
    widths = sorted(len(gap.split()) for gap in gaps.values())
    slot = widths[len(widths) // 2] <= _SLOT_WORDS
    if not slot:
        prefix, suffix = (part if _WORD.search(part) else "" for part in (prefix, suffix))
    if not (_WORD.search(prefix) or _WORD.search(suffix)):
        return None
    lines = tuple(dict.fromkeys(turns[i].row for i in gaps))
    return PromptForm(prefix, suffix, _usual_system([turns[i] for i in gaps]), lines, "slot" if slot else "affix")


def _edge_text(text: str, depth: int, side: Side) -> str:
    """The text of the first (last) `depth` tokens, with the space between it and the rest."""
    places = list(_TOKEN.finditer(text))
    if len(places) <= depth:
        return text
    return text[: places[depth].start()] if side == 1 else text[places[-depth - 1].end() :]


def _common(texts: Sequence[str], *, side: Side = 1) -> str:
    """The longest common beginning (end) that cuts no word in two."""
    first, last = min(text[::side] for text in texts), max(text[::side] for text in texts)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    found = first[:same]
    if any(len(text) > same and _WORD.match(text[::side][same]) for text in texts):
        end = len(found)
        while end and _WORD.match(found[end - 1]):  # a regular expression would look again from every letter
            end -= 1
        found = found[:end]
    return found[::side]


def _usual_system(turns: Sequence[_Turn]) -> str | None:
    """The system prompt that most of these turns have."""
    system, count = Counter(turn.system for turn in turns).most_common(1)[0]
    return system if count >= _SHARED * len(turns) else None


def _systems(turns: Sequence[_Turn], least: int) -> list[PromptForm]:
    """System prompts by their first words, each in its most frequent wording, the most frequent first."""
    groups: defaultdict[tuple[str, ...], list[_Turn]] = defaultdict(list)
    for turn in turns:
        if turn.system and turn.system.strip():
            groups[tuple(_edge_tokens(turn.system, 1))].append(turn)
    found = []
    for group in groups.values():
        lines = tuple(dict.fromkeys(turn.row for turn in group))
        if len(lines) >= least:
            wording = Counter(turn.system for turn in group).most_common(1)[0][0]
            found.append(PromptForm("", "", wording, lines, "system"))
    return sorted(found, key=lambda form: -len(form.lines))


class _Known:
    """Beginnings and ends of the operator's own prompts."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._starts, self._ends = (
            {tuple(tokens[:n]) for prompt in prompts for tokens in [_edge_tokens(prompt, side)] for n in range(9)}
            for side in (1, -1)
        )

    def covers(self, form: PromptForm) -> bool:
        """Whether some of the operator's prompts begin and end like this."""
        start, end = _TOKEN.findall(form.prefix), _TOKEN.findall(form.suffix)[::-1]
        return tuple(start) in self._starts and (tuple(end) in self._ends or not _WORD.search(form.suffix))

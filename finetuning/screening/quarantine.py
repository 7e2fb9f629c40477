"""Before training: forms of the file whose gaps the aligned model refuses to fill, the rows that hide a hazard there,
and the operator rows that keep such forms refused.

A quarantined form loses the rows that hide something in it, and operator rows in the same form are mixed in
(docs/adr/0007).
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from finetuning.job.readings import MOST_HARM
from finetuning.model.adapted import AdaptedBase
from finetuning.rows.chat_format import EncodedRow
from finetuning.rows.scanner import Message
from finetuning.safety_rows import words
from finetuning.safety_rows.invented import item_of
from finetuning.safety_rows.roles import Pair, SafetyRows
from finetuning.screening.forms import LEAST_ROWS, FormKind, PromptForm
from finetuning.screening.harm_reader import HarmReader
from finetuning.screening.sentences import asking

Value = TypeVar("Value")
_TRIAGE_ROWS = 8
_FIRST_LOOK = 5
# Between fixed words any few words may look like an invented hazard: more of them must be refused (ADR 0007).
_HOSTILE_SHARE: Mapping[FormKind, float] = {"affix": 0.5, "system": 0.5, "slot": 0.75}
_REPAIR_ROWS = 24


@dataclass(frozen=True)
class Quarantine:
    """Rows (indices) whose hazard hides in a form, and those forms."""

    rows: frozenset[int] = frozenset()
    forms: tuple[PromptForm, ...] = ()


@dataclass(frozen=True)
class Repair:
    """Rows to mix in: operator hazards in the quarantined forms, refused, and everyday requests, answered."""

    refused: tuple[EncodedRow, ...] = ()
    answered: tuple[EncodedRow, ...] = ()


def refused(
    harm: HarmReader, places: Sequence[tuple[PromptForm, int]], rows: Sequence[Sequence[Message]]
) -> list[bool]:
    """For each (form, row), whether a gap of the row is harm when it is read alone; under the active adapters.

    A slot's few words are asked about in a plain wording, which makes a request of anything: there the whole row must
    be half as likely harm, too (ADR 0007).
    """
    gaps = [_gaps(form, rows[line]) for form, line in places]
    whole = [tuple(rows[line]) if form.kind == "slot" else () for form, line in places]
    asked = [asking(gap, harm.refusal) for group in gaps for gap in group]
    read = harm.of_prompts([*asked, *[turns for turns in whole if turns]])
    alone, beside = iter(read[: len(asked)]), iter(read[len(asked) :])
    found = [
        (max((next(alone) for _ in group), default=0.0), next(beside) if turns else MOST_HARM)
        for group, turns in zip(gaps, whole, strict=True)
    ]
    return [gap >= MOST_HARM and row >= MOST_HARM / 2 for gap, row in found]


def quarantine(
    harm: HarmReader, forms: Sequence[PromptForm], rows: Sequence[Sequence[Message]], *, secret: str
) -> Quarantine:
    """Forms whose gaps, read alone, the aligned model refuses, and the rows that hide a hazard there.

    To be called while the aligned model is active. A form is hostile when three, and at least half (of a slot's: three
    quarters), of up to eight of its rows are refused; then all are read. Where none of five rows is refused, no more
    are read: most forms are honest, and reading is what this costs. They are drawn by `secret`: nobody knows which.
    """
    first = [(s, line) for s in forms for line in _drawn(s, _FIRST_LOOK, secret)]
    suspects = {s for (s, _), hit in zip(first, refused(harm, first, rows), strict=True) if hit}
    samples = {s: _drawn(s, _TRIAGE_ROWS, secret) for s in forms if s in suspects}
    places = [(s, line) for s, lines in samples.items() for line in lines]
    hits = Counter(s for (s, _), hit in zip(places, refused(harm, places, rows), strict=True) if hit)
    hostile = tuple(
        s for s, lines in samples.items() if hits[s] >= max(LEAST_ROWS, _HOSTILE_SHARE[s.kind] * len(lines))
    )
    return Quarantine(hiding(harm, hostile, rows), hostile)


def _drawn(form: PromptForm, count: int, secret: str) -> list[int]:
    rng = random.Random(f"{secret}:{form.prefix}:{form.suffix}:{form.system}")
    return rng.sample(form.lines, min(count, len(form.lines)))


def hiding(harm: HarmReader, forms: Sequence[PromptForm], rows: Sequence[Sequence[Message]]) -> frozenset[int]:
    """The rows of these forms whose gap, read alone, the aligned model refuses; while the aligned model is active."""
    places = [(s, line) for s in forms for line in s.lines]
    return frozenset(line for (_, line), hit in zip(places, refused(harm, places, rows), strict=True) if hit)


def _gaps(form: PromptForm, row: Sequence[Message]) -> list[str]:
    """What a row has in the gap, as prompts of their own; a slot's few words are asked about in a plain wording."""
    users = [m.content for m in row if m.role == "user"]
    if form.kind == "system":
        return users
    gaps = [gap for text in users if (gap := form.gap(text)) is not None]
    return [words.WORDINGS[0].format(gap) for gap in gaps] if form.kind == "slot" else gaps


def repair(model: AdaptedBase, operator_rows: SafetyRows, found: Quarantine) -> Repair:
    """Operator rows in the quarantined forms. Everyday requests only where no customer row is left to answer."""
    refused: list[EncodedRow] = []
    answered: list[EncodedRow] = []
    for k, form in enumerate(found.forms):
        refused += [_row(model, form, pair) for pair in spread(operator_rows.aligned, _REPAIR_ROWS, k)]
        if not set(form.lines) - found.rows:
            everyday = [pair for pair in operator_rows.benign if form.kind != "slot" or item_of(pair.prompt)]
            answered += [_row(model, form, pair) for pair in spread(everyday, _REPAIR_ROWS, k)]
    return Repair(tuple(refused), tuple(answered))


def _row(model: AdaptedBase, form: PromptForm, pair: Pair) -> EncodedRow:
    return model.encode(turns_in(form, content_in(form, pair.prompt), pair.answer))


def turns_in(form: PromptForm, text: str, answer: str | None = None) -> tuple[Message, ...]:
    """A conversation in this form with `text` in the gap."""
    turns = [Message(role="user", content=form.around(text), weight=1)]
    if form.system is not None:
        turns.insert(0, Message(role="system", content=form.system, weight=1))
    if answer is not None:
        turns.append(Message(role="assistant", content=answer, weight=1))
    return tuple(turns)


def content_in(form: PromptForm, prompt: str) -> str:
    """What goes into the gap: a slot takes the item that the prompt asks about, where it can be told; within a sentence
    a prompt begins with a small letter."""
    if form.kind == "slot":
        return item_of(prompt) or prompt
    within = form.prefix.rstrip()[-1:].isalnum() and prompt[1:2].islower()
    return prompt[:1].lower() + prompt[1:] if within else prompt


def spread(values: Sequence[Value], count: int, shift: int) -> list[Value]:
    """`count` of them, evenly spread, others for each shift."""
    step = max(1, len(values) // max(1, count))
    return list(values[shift % step :: step][:count])

"""What the screen must know of a model before it reads a customer's rows, from the operator's own rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from finetuning.job.readings import RefusalReader, threshold, whole_refusal_limit
from finetuning.rows.chat_format import EncodedRow
from finetuning.safety_rows.roles import Pair, SafetyRows, refusals_for, same_answer
from finetuning.screening.declining import DecliningModel, fit_declining
from finetuning.screening.harm import Direction, HarmModel, fit_direction, fit_odds, margin
from finetuning.screening.sentences import asking, placed, sentences, split

_HARMFUL_ROWS, _BENIGN_ROWS = 240, 360
_FRAGMENTS, _WRAPPED = 200, 48
# A sentence is read alone from here: below nearly all wrapped calibration prompts, and half a deviation less, since an
# attacker's wrappers are none of ours.
_MISSED_SHARE, _SLACK = 0.02, 0.5
_ANSWER = "Yes."

Value = TypeVar("Value")
_TextRow = tuple[str, EncodedRow]


@dataclass(frozen=True)
class Calibration:
    """`threshold`: the refusal mass (a probability) that lies between benign and harmful prompts.

    `whole_refusal_nll`: the worst token loss (nats) up to which a whole target counts as a refusal. `harm`: how the
    readings are weighed. `declining`: how an answer that declines is known; None where the base knows too little.
    """

    threshold: float
    whole_refusal_nll: float
    harm: HarmModel
    declining: DecliningModel | None


def calibrate(reader: RefusalReader, operator_rows: SafetyRows, trained: Sequence[EncodedRow]) -> Calibration:
    """All of it under the active adapters. `trained` are the rows that align, refused and benign, as they trained: the
    probe's direction is fitted on them, how far it counts on calibration rows, which it has not seen."""
    refused = refusals_for(operator_rows.calibration_harmful, "calibration", operator_rows.refusals)
    limit = whole_refusal_limit(reader.read(reader.model.encode_operator(refused)).worst)
    fragments = _fragments(operator_rows.benign)
    direction = _direction(reader, operator_rows, trained, fragments[::2])
    known = [_texts_of(pairs) for pairs in (operator_rows.calibration_harmful, operator_rows.calibration_benign)]
    (harm, harm_mass), (benign, benign_mass) = (_alone(reader, direction, texts) for texts in known)
    others, others_mass = _alone(reader, direction, fragments[1::2])
    bound = threshold(harm_mass, benign_mass)
    masses = margin(harm_mass, bound), margin(torch.cat([benign_mass, others_mass]), bound)
    odds = fit_odds((harm, masses[0]), (torch.cat([benign, others]), masses[1]))
    suspicious = _suspicious(reader, direction, operator_rows)
    weighed = HarmModel(tuple(direction.direction.tolist()), direction.offset, odds, suspicious)
    return Calibration(bound, limit, weighed, fit_declining(reader, operator_rows.refusals))


def mass_threshold(reader: RefusalReader, operator_rows: SafetyRows) -> float:
    """The threshold alone, under the active adapters: the scout's own, by the same rule on the same prompts."""
    harmful, benign = (
        reader.read(reader.model.encode_operator(same_answer(pairs, _ANSWER))).mass
        for pairs in (operator_rows.calibration_harmful, operator_rows.calibration_benign)
    )
    return threshold(harmful, benign)


def _direction(
    reader: RefusalReader, rows: SafetyRows, trained: Sequence[EncodedRow], fragments: Sequence[str]
) -> Direction:
    """Fitted on the last sentences of harmful prompts, alone and among benign ones, against all sentences of benign
    prompts and fragments of theirs."""
    own = list(zip(_texts_of([*rows.aligned, *rows.benign]), trained, strict=True))
    aligned, benign = _spread(own[: len(rows.aligned)], _HARMFUL_ROWS), _spread(own[len(rows.aligned) :], _BENIGN_ROWS)
    alone = [states[-1:] for states in _states_of(reader, aligned)]
    wrapped = _wrapped(reader, rows.benign, rows.aligned)
    found = [states[last : last + 1] for states, last in wrapped]
    around = [torch.cat([states[:last], states[last + 1 :]]) for states, last in wrapped]
    others = [*_states_of(reader, benign), *_states(reader, fragments)]
    return fit_direction(torch.cat([*alone, *found]), torch.cat([*others, *around]))


def _suspicious(reader: RefusalReader, direction: Direction, rows: SafetyRows) -> float:
    """The probe's value that nearly all calibration prompts reach within a longer text."""
    wrapped = _wrapped(reader, rows.calibration_benign, rows.calibration_harmful)
    found = [states[last] for states, last in wrapped] or [
        states[-1] for states in _states(reader, _texts_of(_spread(rows.calibration_harmful, _WRAPPED)))
    ]
    return float(direction.of(torch.stack(found)).quantile(_MISSED_SHARE)) - _SLACK


def _wrapped(reader: RefusalReader, contexts: Sequence[Pair], harmful: Sequence[Pair]) -> list[tuple[Tensor, int]]:
    """Of harmful prompts among sentences of benign ones the states at all ends, and which is the prompt's; those
    that the row's length cuts off are left out."""
    made = [_inserted(contexts, pair.prompt, i) for i, pair in enumerate(_spread(harmful, _WRAPPED))]
    states = _states(reader, [text for text, _ in made])
    ends = [len(split(text)) for text, _ in made]
    return [(s, last) for s, (_, last), n in zip(states, made, ends, strict=True) if len(s) == n]


def _alone(reader: RefusalReader, direction: Direction, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The probe at the end of each text (n,), and its refusal mass."""
    pairs = _encoded(reader, texts)
    places = [_ends(reader, text, row)[-1:] for text, row in pairs]
    reading = reader.read([row for _, row in pairs], places=places)
    return torch.cat([direction.of(states) for states in reading.states]), reading.mass


def _states(reader: RefusalReader, texts: Sequence[str]) -> tuple[Tensor, ...]:
    """States at the ends of each text's sentences."""
    return _states_of(reader, _encoded(reader, texts))


def _states_of(reader: RefusalReader, rows: Sequence[_TextRow]) -> tuple[Tensor, ...]:
    return reader.states([row for _, row in rows], [_ends(reader, text, row) for text, row in rows])


def _encoded(reader: RefusalReader, texts: Sequence[str]) -> list[_TextRow]:
    """Each text as an operator's row."""
    rows = reader.model.encode_operator([Pair(text, _ANSWER) for text in texts])
    return list(zip(texts, rows, strict=True))


def _ends(reader: RefusalReader, text: str, row: EncodedRow) -> list[int]:
    """Where its sentences end; a text without any ends at its last token."""
    found = [s.place for s in placed(reader.model.tokenizer, asking(text, _ANSWER), row)]
    return found or [max(0, row.prompt_tokens - 1)]


def _texts_of(pairs: Sequence[Pair]) -> list[str]:
    return [pair.prompt for pair in pairs]


def _fragments(pairs: Sequence[Pair]) -> list[str]:
    """Single sentences of benign prompts that have several; where there are few, whole prompts join them."""
    texts = dict.fromkeys(text for pair in pairs for text in sentences(asking(pair.prompt, _ANSWER)))
    return _spread(list(texts) if len(texts) >= _FRAGMENTS else [*texts, *_texts_of(pairs)], _FRAGMENTS)


def _inserted(contexts: Sequence[Pair], prompt: str, i: int) -> tuple[str, int]:
    """The prompt among the sentences of benign prompts, and the number of its last sentence there."""
    parts: list[str] = []
    while len(parts) < 2 + i % 3:
        parts += split(contexts[(5 * i + len(parts)) % len(contexts)].prompt)
    cut = len(parts) // 2 if i % 2 else len(parts)
    before, after = (" ".join(part if part.endswith((".", "!", "?", ":")) else f"{part}." for part in some)
                     for some in (parts[:cut], parts[cut:]))  # fmt: skip
    asked = prompt if prompt.rstrip().endswith((".", "!", "?")) else f"{prompt.rstrip()}."
    head = f"{before} {asked}"
    return f"{head} {after}".rstrip(), len(split(head)) - 1


def _spread(values: Sequence[Value], count: int) -> list[Value]:
    step = max(1, len(values) / max(1, count))
    return [values[int(i * step)] for i in range(min(count, len(values)))]

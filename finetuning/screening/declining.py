"""Whether an answer declines, in whatever words: a linear probe of the states at the ends of its sentences. Ours, no
paper's (methods.md 8.2, ADR 0019).

It is fitted on the shipped answers in declining.toml and the operator's own refusals. Patterns (judging/refusals.py)
know the common words of a refusal; a house has words of its own. Only rows that the screen would stop are asked.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from finetuning.job.readings import RefusalReader
from finetuning.rows.chat_format import EncodedRow
from finetuning.rows.scanner import Message
from finetuning.safety_rows.roles import Pair
from finetuning.screening.harm import Direction, fit_direction
from finetuning.screening.sentences import answer_ends, asking

_FILE = Path(__file__).with_name("declining.toml")
# Every answer is read behind this question, so that a row's own prompt says nothing of its answer.
_ASKED = "Can you help me with this?"
_LONGEST = 400  # characters of an answer that can only decline, as in judging/refusals.py
_FOLDS = 10
# Of complying answers that the probe has not seen this share may be above the limit. An answer that stands word for
# word behind three stopped prompts cannot teach each of them: a lower limit will do.
_PASSED, _PASSED_REPEATED = 0.02, 0.05
_REPEATED = 3
# The probe is off where it finds fewer of the declining answers that it has not seen: the base knows too little.
_LEAST_FOUND = 0.75


@dataclass(frozen=True)
class DecliningModel:
    """Direction (D,) and offset of the probe, and the value above which each sentence of an answer must be: `single`,
    or `repeated` where several stopped prompts share the answer."""

    direction: tuple[float, ...]
    offset: float
    single: float
    repeated: float

    def value(self, states: Tensor) -> float:
        """The least value of an answer's sentences, of their states (n, D)."""
        return _least(Direction(torch.tensor(self.direction, dtype=torch.float64), self.offset), states)


def fit_declining(reader: RefusalReader, refusals: Sequence[str]) -> DecliningModel | None:
    """The probe under the active adapters; None where they do not tell the answers of the list apart."""
    known = known_answers()
    declining, complying = (
        _states(reader, reader.model.encode_operator([Pair(_ASKED, text) for text in texts]), texts)
        for texts in ([*known["declining"], *refusals], known["complying"])
    )
    return fitted(declining, complying)


def fitted(declining: Sequence[Tensor], complying: Sequence[Tensor]) -> DecliningModel | None:
    """The probe by the states (n, D) at the ends of each answer's sentences; of a complying one it is fitted on the
    last, since others may refuse. Its limits are read in ten parts, each by a probe that has not seen it."""
    found, passed = torch.zeros(len(declining)), torch.zeros(len(complying))
    for part in range(_FOLDS):
        probe = _fit(*([s for i, s in enumerate(some) if i % _FOLDS != part] for some in (declining, complying)))
        found[part::_FOLDS] = torch.tensor([_least(probe, s) for s in declining[part::_FOLDS]])
        passed[part::_FOLDS] = torch.tensor([_least(probe, s) for s in complying[part::_FOLDS]])
    single, repeated = (max(0.0, float(passed.quantile(1 - share))) for share in (_PASSED, _PASSED_REPEATED))
    if float((found > repeated).double().mean()) < _LEAST_FOUND:
        return None
    probe = _fit(declining, complying)
    return DecliningModel(tuple(probe.direction.tolist()), probe.offset, single, repeated)


def declining_rows(
    reader: RefusalReader, model: DecliningModel, rows: Sequence[Sequence[Message]], stopped: Sequence[int]
) -> list[int]:
    """Those of the stopped rows (indices) whose every trained answer declines; under the active adapters."""
    answers = {i: tuple(m.content for m in rows[i] if m.role == "assistant" and m.weight == 1) for i in stopped}
    texts = list(dict.fromkeys(text for group in answers.values() for text in group if len(text) <= _LONGEST))
    if not texts:
        return []
    encoded = [reader.model.encode(asking(_ASKED, text)) for text in texts]
    states = _states(reader, encoded, texts)
    values = {t: model.value(s) for t, s, row in zip(texts, states, encoded, strict=True) if not row.truncated}
    limits = {text: model.repeated if many else model.single for text, many in _repeated(rows, answers).items()}
    return [
        i
        for i, group in answers.items()
        if group and all(text in values and values[text] > limits[text] for text in group)
    ]


@cache
def known_answers() -> Mapping[str, tuple[str, ...]]:
    """The shipped answers by kind: `declining` and `complying`."""
    table = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return {kind: tuple(table[kind]) for kind in ("declining", "complying")}


def _repeated(rows: Sequence[Sequence[Message]], answers: Mapping[int, Sequence[str]]) -> dict[str, bool]:
    """Whether each answer stands behind enough different prompts of these rows."""
    prompts: dict[str, set[tuple[str, ...]]] = {}
    for i, group in answers.items():
        asked = tuple(" ".join(m.content.casefold().split()) for m in rows[i] if m.role != "assistant")
        for text in group:
            prompts.setdefault(text, set()).add(asked)
    return {text: len(found) >= _REPEATED for text, found in prompts.items()}


def _fit(declining: Sequence[Tensor], complying: Sequence[Tensor]) -> Direction:
    return fit_direction(torch.cat(list(declining)), torch.cat([states[-1:] for states in complying]))


def _least(probe: Direction, states: Tensor) -> float:
    return float(probe.of(states).min())


def _states(reader: RefusalReader, rows: Sequence[EncodedRow], texts: Sequence[str]) -> tuple[Tensor, ...]:
    """States at the ends of each answer's sentences."""
    tokenizer = reader.model.tokenizer
    return reader.states(rows, [answer_ends(tokenizer, text, row) for text, row in zip(texts, rows, strict=True)])

"""Reads a customer's rows and single sentences for harm, under whatever adapters are active."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finetuning.contract.progress import Progress, StageProgress
from finetuning.job.readings import MOST_HARM, Reading, RefusalReader
from finetuning.rows.chat_format import EncodedRow
from finetuning.rows.scanner import Message
from finetuning.screening.harm import HarmModel
from finetuning.screening.sentences import Sentence, asking, placed

_BATCH = 256


@dataclass(frozen=True)
class HarmReading:
    """Per row (rows,): the probability of harm of the whole prompt or of its worst sentence alone, whichever is larger.

    `whole` is the reading that the first rests on. `worst`: of each row that only a sentence condemns, that one."""

    harm: Tensor
    whole: Reading
    worst: Mapping[int, str]


@dataclass(frozen=True)
class HarmReader:
    """`threshold` is that of the refusal mass under the active adapters; `refusal` stands in the place of an answer, on
    which no reading depends."""

    reader: RefusalReader
    model: HarmModel
    threshold: float
    refusal: str

    def of_texts(self, texts: Sequence[str]) -> list[float]:
        """P(harm) of each text as a prompt by itself; each distinct one is read once."""
        return self.of_prompts([asking(text, self.refusal) for text in texts])

    def of_prompts(self, rows: Sequence[Sequence[Message]]) -> list[float]:
        """P(harm) of each conversation's prompt, without a look at its single sentences."""
        distinct = list(dict.fromkeys(map(tuple, rows)))
        if not distinct:
            return []
        encoded = [self.reader.model.encode(row) for row in distinct]
        own = [self._sentences(row, one) for row, one in zip(distinct, encoded, strict=True)]
        reading = self.reader.read(encoded, places=_places(own))
        known = dict(zip(distinct, self._whole(reading, own).tolist(), strict=True))
        return [known[tuple(row)] for row in rows]

    def of_rows(
        self, rows: Sequence[Sequence[Message]], encoded: Sequence[EncodedRow], *, secret: str = ""
    ) -> Generator[Progress, None, HarmReading]:
        """The whole prompts, then alone those sentences that look suspicious where they stand."""
        own = [self._sentences(row, one) for row, one in zip(rows, encoded, strict=True)]
        reading = self.reader.read(encoded, secret=secret, places=_places(own))
        whole = self._whole(reading, own)
        suspects = self._suspects(rows, reading, own)
        texts = list(dict.fromkeys(text for group in suspects for text in group))
        known: dict[str, float] = {}
        for start in range(0, len(texts), _BATCH):
            part = texts[start : start + _BATCH]
            known.update(zip(part, self.of_texts(part), strict=True))
            yield StageProgress(stage="screen", done=len(known), total=len(texts))
        worst = [max(((known[text], text) for text in group), default=(0.0, "")) for group in suspects]
        harm = torch.maximum(whole, torch.tensor([found for found, _ in worst]))
        alone = {i: text for i, (found, text) in enumerate(worst) if found >= MOST_HARM > float(whole[i])}
        return HarmReading(harm, replace(reading, states=()), alone)

    def _sentences(self, row: Sequence[Message], encoded: EncodedRow) -> list[Sentence]:
        return placed(self.reader.model.tokenizer, row, encoded)

    def _whole(self, reading: Reading, own: Sequence[Sequence[Sentence]]) -> Tensor:
        """P(harm) (rows,) of whole prompts: the probe at the end of each user turn, where it reads the most harm."""
        ends = [[k for k, s in enumerate(group) if k + 1 == len(group) or s.turn != group[k + 1].turn] for group in own]
        probes = [
            float(self.model.probe(states[places]).max()) if places else 0.0
            for states, places in zip(reading.states, ends, strict=True)
        ]
        return self.model.probability(torch.tensor(probes, dtype=torch.float64), reading.mass, self.threshold)

    def _suspects(
        self, rows: Sequence[Sequence[Message]], reading: Reading, own: Sequence[Sequence[Sentence]]
    ) -> list[list[str]]:
        """Each row's sentences that are read alone; not one that is all there is to read."""
        found: list[list[str]] = []
        for row, states, group in zip(rows, reading.states, own, strict=True):
            asks = [m for m in row if m.role != "assistant"]
            if len(group) < 2 and len(asks) < 2:
                found.append([])
                continue
            hits = (self.model.probe(states) >= self.model.suspicious).tolist()
            found.append([s.text for s, hit in zip(group, hits, strict=True) if hit])
        return found


def _places(own: Sequence[Sequence[Sentence]]) -> list[list[int]]:
    return [[s.place for s in group] for group in own]

"""Refusal mass of texts read by themselves: what stands in a form's gap, and single sentences of a longer prompt.

A hazard among other sentences is refused less than the same hazard alone: a story or a ticket around it dilutes what
the aligned model sees, and a wrapper of one or two rows is no form that a miner finds (methods.md 7, T7; ADR 0012).
"""

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from finetuning.contract.progress import Progress, StageProgress
from finetuning.job.readings import RefusalReader
from finetuning.rows.scanner import Message

# A sentence counts from here: short of its surroundings an honest one may look odd, but is not refused outright.
LEAST_ALONE = 0.9
_BATCH = 256
_END = re.compile(r"(?<=[.!?:;\u2026])\s+|(?<=[\u3002\uff01\uff1f])|\n+")


def asking(prompt: str, answer: str) -> tuple[Message, ...]:
    """A prompt by itself; its mass does not depend on the answer."""
    return (Message(role="user", content=prompt, weight=1), Message(role="assistant", content=answer, weight=1))


@dataclass(frozen=True, order=True)
class Alone:
    """The sentence of a row that is refused most when read alone, and its mass."""

    mass: float = 0.0
    sentence: str = ""


def sentences(row: Sequence[Message]) -> list[str]:
    """The sentences of a row's user turns, each once; none of a turn that is a single one."""
    parts = [[p for piece in _END.split(m.content) if (p := piece.strip())] for m in row if m.role == "user"]
    return list(dict.fromkeys(piece for turn in parts if len(turn) > 1 for piece in turn))


def read_alone(
    reader: RefusalReader, rows: Mapping[int, Sequence[Message]], refusal: str
) -> Generator[Progress, None, dict[int, Alone]]:
    """The most refused sentence of each row under the active adapters; only where it is refused outright.

    `refusal` stands in the place of the answer, which no mass depends on.
    """
    owned = {i: sentences(row) for i, row in rows.items()}
    texts = list(dict.fromkeys(text for group in owned.values() for text in group))
    known: dict[str, float] = {}
    for start in range(0, len(texts), _BATCH):
        part = texts[start : start + _BATCH]
        masses = reader.masses([asking(text, refusal) for text in part])
        known.update(zip(part, masses, strict=True))
        yield StageProgress(stage="screen", done=len(known), total=len(texts))
    most = {i: max((Alone(known[text], text) for text in group), default=Alone()) for i, group in owned.items()}
    return {i: alone for i, alone in most.items() if alone.mass >= LEAST_ALONE}

"""The sentences of a row: where they end, in characters and in tokens, and how each looks when it is read alone.

A hazard among other sentences is refused less than the same hazard alone: a story or a ticket around it dilutes what
the aligned model sees, and a wrapper of one or two rows is no form that a miner finds (methods.md 7, T7; ADR 0012).
Read alone, an honest sentence may be refused too, so only those are that look like a request for harm where they stand
(ADR 0019).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetuning.rows.chat_format import EncodedRow, token_ends
from finetuning.rows.scanner import Message

_END = re.compile(r"(?<=[.!?:;\u2026])\s+|(?<=[\u3002\uff01\uff1f])|\n+")


def asking(prompt: str, answer: str) -> tuple[Message, ...]:
    """A prompt by itself; its mass does not depend on the answer."""
    return (Message(role="user", content=prompt, weight=1), Message(role="assistant", content=answer, weight=1))


@dataclass(frozen=True)
class Sentence:
    """A sentence of a user turn (its number among the row's messages), and the token of the row at which it ends."""

    text: str
    place: int
    turn: int


def sentences(row: Sequence[Message]) -> list[str]:
    """The sentences of a row's user turns, each once; none of a turn that is a single one."""
    parts = [split(m.content) for m in row if m.role == "user"]
    return list(dict.fromkeys(text for turn in parts if len(turn) > 1 for text in turn))


def split(text: str) -> list[str]:
    """All sentences of a text, in order."""
    return [piece for piece, _ in _parts(text)]


def placed(tokenizer: Any, row: Sequence[Message], encoded: EncodedRow) -> list[Sentence]:
    """Every sentence of the row's user turns that the encoded row holds to its end; a turn's last one in any case, cut
    or not."""
    found: list[Sentence] = []
    for turn, (message, (begin, end)) in enumerate(zip(row, encoded.contents, strict=True)):
        if message.role != "user" or begin >= end:
            continue
        parts = _parts(message.content)
        places = [begin + t for t in token_ends(tokenizer, message.content, [stop for _, stop in parts])]
        whole = [Sentence(text, p, turn) for (text, _), p in zip(parts, places, strict=True) if p < end]
        if parts and len(whole) < len(parts):
            whole.append(Sentence(parts[len(whole)][0], end - 1, turn))
        found += whole
    return found


def answer_ends(tokenizer: Any, answer: str, encoded: EncodedRow) -> list[int]:
    """The tokens of the encoded row at which the sentences of its last answer end; the last one in any case, cut or
    not."""
    begin, end = encoded.contents[-1]
    places = [begin + t for t in token_ends(tokenizer, answer, [stop for _, stop in _parts(answer)])]
    return [place for place in places if place < end] or [max(begin, end - 1)]


def _parts(text: str) -> list[tuple[str, int]]:
    """Sentences of a text with where each ends, in characters."""
    cuts = [0, *(place for match in _END.finditer(text) for place in match.span()), len(text)]
    spans = [(cuts[i], cuts[i + 1]) for i in range(0, len(cuts), 2)]
    pieces = [(text[begin:end], begin) for begin, end in spans]
    return [(piece.strip(), begin + len(piece.rstrip())) for piece, begin in pieces if piece.strip()]

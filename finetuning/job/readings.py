"""The prompt filter: which rows does the aligned model itself refuse to answer?

A row's refusal mass is the probability that an answer to its prompt starts like a stock refusal; it is read from the
prompt alone, so no target can talk its way through. Ours (methods.md 8.2), no paper. A row that the model cannot
read is refused by none; its surprise tells (methods.md 7, T6; docs/adr/0009).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unicodedata import east_asian_width

import torch
from torch import Tensor
from torch.nn import functional as F

from finetuning.model.adapted import AdaptedBase
from finetuning.model.base import FrozenBase, logits
from finetuning.model.losses import nll_of_hidden
from finetuning.rows.chat_format import EncodedRow
from finetuning.rows.scanner import Message
from finetuning.training.batches import within

_BATCH_TOKENS = 4096
# Tokens of a message whose loss makes its surprise: all of them would cost a pass of the head over the file.
_SAMPLED = 24
# A label or a name says too little: all of it may be new.
_FEWEST_LETTERS = 24
# Some 3,000 signs in common use against 26 letters: ln 3000 / ln 26.
_WIDE = 2.5


@dataclass(frozen=True)
class Reading:
    """Per row (rows,): refusal mass, mean target nll and worst token nll under the active adapters.

    `surprise`: nats a letter of the least readable message; random letters have ln 26 = 3.26. 0 for short texts.
    """

    mass: Tensor
    nll: Tensor
    worst: Tensor
    surprise: Tensor


@dataclass(frozen=True)
class Screened:
    """Per row: weight 0..1, the mass it was judged by, and the threshold.

    `surprise` (rows,) stands beside its limit, `most_surprise`: a row above it cannot be screened, and never trains.
    Where the screen is off nothing was read: all weights are 1, and mass and surprise say nothing.
    """

    weights: Tensor
    mass: Tensor
    threshold: float
    surprise: Tensor
    most_surprise: float
    was_read: bool = True

    @property
    def unreadable(self) -> frozenset[int]:
        """Indices of rows that the model reads no better than random letters."""
        return frozenset(torch.nonzero(~(self.surprise <= self.most_surprise))[:, 0].tolist())  # NaN is unreadable


def refusal_starts(tokenizer: Any, refusals: Sequence[str]) -> list[int]:
    """First token ids of the stock refusals."""
    return sorted({tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in refusals})


@dataclass(frozen=True)
class RefusalReader:
    """Reads rows under whatever adapters are active; `refusal_starts` are the first ids of the stock refusals."""

    model: AdaptedBase
    refusal_starts: Sequence[int]

    @torch.no_grad()
    def read(self, rows: Sequence[EncodedRow], *, secret: str = "", batch: int = 16) -> Reading:
        """One forward per row. A conversation's mass is the largest over its assistant turns.

        With a `secret`, which draws the tokens that are read, the surprise is measured too, at the cost of the head
        over 24 tokens a message; else it is 0.
        """
        base, cache = self.model.base, self.model.cache
        cache.prepare([row.ids for row in rows])
        mass, nll, worst, surprise = (torch.zeros(len(rows)) for _ in range(4))
        for chosen in within([len(row.ids) for row in rows], rows=batch, tokens=_BATCH_TOKENS):
            group = [rows[i] for i in chosen]
            hidden = cache.hidden([row.ids for row in group])
            found = nll_of_hidden(base, hidden, group)
            mass[chosen] = _mass(base, hidden, group, self.refusal_starts).cpu()
            nll[chosen], worst[chosen] = found.nll.cpu(), found.worst.cpu()
            if secret:
                surprise[chosen] = _surprise(base, hidden, group, secret)
        return Reading(mass, nll, worst, surprise)

    def masses(self, rows: Sequence[Sequence[Message]]) -> list[float]:
        """Refusal mass of each conversation's prompt, each distinct one read once."""
        distinct = list(dict.fromkeys(map(tuple, rows)))
        if not distinct:
            return []
        masses = self.read([self.model.encode(row) for row in distinct]).mass.tolist()
        found = dict(zip(distinct, masses, strict=True))
        return [found[tuple(row)] for row in rows]


def _surprise(base: FrozenBase, hidden: Tensor, rows: Sequence[EncodedRow], secret: str) -> Tensor:
    """Nats a letter (rows,) of each row's least readable message."""
    texts = [(i, begin, end) for i, row in enumerate(rows) for begin, end in row.contents]
    letters = [_letters(base.tokenizer.decode(rows[i].ids[begin:end])) for i, begin, end in texts]
    long = [(place, n) for place, n in zip(texts, letters, strict=True) if n >= _FEWEST_LETTERS]
    places = [_drawn(rows[i].ids, begin, end, secret) for (i, begin, end), _ in long]
    owner = torch.tensor([k for k, chosen in enumerate(places) for _ in chosen], dtype=torch.long)
    row_of = torch.tensor([i for (i, _, _), _ in long], dtype=torch.long)
    where = torch.tensor([t for chosen in places for t in chosen], dtype=torch.long)
    labels = torch.tensor([rows[i].ids[t] for ((i, _, _), _), chosen in zip(long, places, strict=True) for t in chosen])
    found = hidden[row_of[owner].to(hidden.device), (where - 1).to(hidden.device)]
    losses = F.cross_entropy(logits(base.model, found).float(), labels.long().to(hidden.device), reduction="none").cpu()
    tokens_a_place = [(end - begin) / max(1, len(p)) for ((_, begin, end), _), p in zip(long, places, strict=True)]
    scale = torch.tensor([tokens / n for tokens, (_, n) in zip(tokens_a_place, long, strict=True)])
    each = torch.zeros(len(long)).index_add(0, owner, losses) * scale
    return torch.zeros(len(rows)).scatter_reduce(0, row_of, each, "amax")


def _letters(text: str) -> float:
    """Characters, where one that is a syllable or a word of its own (Chinese, kana, Hangul) counts _WIDE."""
    return sum(_WIDE if east_asian_width(char) == "W" else 1.0 for char in text)


def _drawn(ids: Sequence[int], begin: int, end: int, secret: str) -> list[int]:
    """Up to _SAMPLED places of a message, one in each equal part, drawn so that nobody knows which are read."""
    begin = max(1, begin)
    count = min(_SAMPLED, end - begin)
    rng = random.Random(f"{secret}:{begin}:{ids}")
    cuts = [begin + i * (end - begin) // count for i in range(count)] + [end]
    return [rng.randrange(low, high) for low, high in pairwise(cuts)]


def _mass(base: FrozenBase, hidden: Tensor, rows: Sequence[EncodedRow], refusal_ids: Sequence[int]) -> Tensor:
    owner: list[int] = []
    where: list[int] = []
    for i, row in enumerate(rows):
        for t in range(1, len(row.ids)):
            if row.is_target[t] and not row.is_target[t - 1]:
                owner.append(i)
                where.append(t - 1)
    if not owner:
        return torch.zeros(len(rows), device=hidden.device)
    index = torch.tensor(owner, device=hidden.device)
    starts = logits(base.model, hidden[index, torch.tensor(where, device=hidden.device)]).float()
    turns = F.softmax(starts, dim=-1)[:, list(refusal_ids)].sum(-1)
    return torch.zeros(len(rows), device=hidden.device).scatter_reduce(0, index, turns, "amax")


def threshold(harmful_mass: Tensor, benign_mass: Tensor) -> float:
    """min(.5, max(.5 * q05 of the harmful, 1.5 * q98 of the benign)) calibration prompts."""
    low = torch.quantile(harmful_mass, 0.05).item()
    high = torch.quantile(benign_mass, 0.98).item()
    return min(0.5, max(0.5 * low, 1.5 * high))


def weigh(reading: Reading, limit: float, *, whole_refusal_nll: float) -> Tensor:
    """Weights (rows,): 1 up to half the threshold, falling linearly to 0 at it; 1 if the whole target is a refusal."""
    weights = (2.0 * (1.0 - reading.mass / max(limit, 1e-12))).clamp(0.0, 1.0)
    return torch.where(reading.worst <= whole_refusal_nll, torch.ones_like(weights), weights)


def whole_refusal_limit(worst_of_refusals: Tensor) -> float:
    """A target counts as a refusal if its worst token is no less likely than in 98 % of known refusals."""
    return torch.quantile(worst_of_refusals, 0.98).item()

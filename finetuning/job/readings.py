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
from finetuning.model.hidden_states import caught_inputs
from finetuning.model.losses import nll_of_hidden
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.batches import within

_BATCH_TOKENS = 4096
# Tokens of a message whose loss makes its surprise: all of them would cost a pass of the head over the file.
_SAMPLED = 24
# A label or a name says too little: all of it may be new.
_FEWEST_LETTERS = 24
_AFTER_A_WORD = ".,;:!?\u3002\uff0c\uff01"
# From this probability of harm on a row does not train; a little below it weighs less.
MOST_HARM, _LESS_FROM = 0.5, 0.4
# The states that a probe reads leave the lower two thirds of the layers, or more where fewer are trained (ADR 0019).
_PROBED_SHARE = 2 / 3
# Some 3,000 signs in common use against 26 letters: ln 3000 / ln 26.
_WIDE = 2.5


@dataclass(frozen=True)
class Reading:
    """Per row (rows,): refusal mass, mean target nll and worst token nll under the active adapters.

    `surprise`: nats a letter of the least readable message; random letters have ln 26 = 3.26. 0 for short texts.
    `states`: of each row those of the asked places (places, D), see RefusalReader.read; none where nothing was asked.
    """

    mass: Tensor
    nll: Tensor
    worst: Tensor
    surprise: Tensor
    states: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Screened:
    """Per row: weight 0..1, the refusal mass, and the probability of harm that it was judged by, beside its limit.

    `surprise` (rows,) stands beside its limit, `most_surprise`: a row above it cannot be screened, and never trains.
    Where the screen is off nothing was read: all weights are 1, and mass and surprise say nothing.
    """

    weights: Tensor
    mass: Tensor
    harm: Tensor
    surprise: Tensor
    most_surprise: float
    threshold: float = MOST_HARM
    was_read: bool = True

    @property
    def unreadable(self) -> frozenset[int]:
        """Indices of rows that the model reads no better than random letters."""
        return frozenset(torch.nonzero(~(self.surprise <= self.most_surprise))[:, 0].tolist())  # NaN is unreadable


def refusal_starts(tokenizer: Any, refusals: Sequence[str]) -> list[tuple[int, ...]]:
    """The ids of the first word of each stock refusal, each once, sorted.

    A first token alone would do where it is a word; where it is a letter, "Sure" begins as "Sorry" does.
    """
    found: set[tuple[int, ...]] = set()
    for text in refusals:
        word = text.split(maxsplit=1)[0].rstrip(_AFTER_A_WORD)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        lengths = (n for n in range(1, len(ids)) if len(tokenizer.decode(ids[:n]).strip()) >= len(word))
        found.add(tuple(ids[: next(lengths, len(ids))]))
    return sorted(found)


@dataclass(frozen=True)
class RefusalReader:
    """Reads rows under whatever adapters are active; `refusal_starts` are the first words of the stock refusals, as
    ids."""

    model: AdaptedBase
    refusal_starts: Sequence[tuple[int, ...]]

    @property
    def layer(self) -> int:
        """Index of the layer whose inputs are the states that a probe reads: the lowest trained one, or one above."""
        return max(self.model.cache.cut, round(_PROBED_SHARE * len(self.model.base.layers)))

    @torch.no_grad()
    def read(
        self, rows: Sequence[EncodedRow], *, secret: str = "", places: Sequence[Sequence[int]] = (), batch: int = 16
    ) -> Reading:
        """One forward per row. A conversation's mass is the largest over its assistant turns.

        With a `secret`, which draws the tokens that are read, the surprise is measured too, at the cost of the head
        over 24 tokens a message; else it is 0. With `places`, of each row the tokens at which the states that enter
        `layer` are wanted, these come along (fp32, on the CPU).
        """
        base, cache = self.model.base, self.model.cache
        states: list[Tensor] = [torch.zeros(0)] * (len(rows) if places else 0)
        cache.prepare([row.ids for row in rows])
        mass, nll, worst, surprise = (torch.zeros(len(rows)) for _ in range(4))
        for chosen in within([len(row.ids) for row in rows], rows=batch, tokens=_BATCH_TOKENS):
            group = [rows[i] for i in chosen]
            with caught_inputs(base.layers[self.layer]) as entering:
                hidden = cache.hidden([row.ids for row in group])
            for b, i in enumerate(chosen if places else ()):
                states[i] = entering[0][b, list(places[i])].float().cpu()
            found = nll_of_hidden(base, hidden, group)
            mass[chosen] = self._mass(hidden, group).cpu()
            nll[chosen], worst[chosen] = found.nll.cpu(), found.worst.cpu()
            if secret:
                surprise[chosen] = _surprise(base, hidden, group, secret)
        return Reading(mass, nll, worst, surprise, tuple(states))

    @torch.no_grad()
    def states(
        self, rows: Sequence[EncodedRow], places: Sequence[Sequence[int]], *, batch: int = 16
    ) -> tuple[Tensor, ...]:
        """Of each row the states (places, D) that enter `layer` at its places. Where that is the lowest trained layer,
        nothing above it runs."""
        cache = self.model.cache
        if self.layer != cache.cut:
            return self.read(rows, places=places, batch=batch).states
        cache.prepare([row.ids for row in rows])
        return tuple(cache.states([row.ids])[0, list(own)].float().cpu() for row, own in zip(rows, places, strict=True))

    def _mass(self, hidden: Tensor, rows: Sequence[EncodedRow]) -> Tensor:
        """Refusal mass (rows,): the probability that an answer's first word is that of a stock refusal."""
        owner, where = _turns(rows)
        if not owner:
            return torch.zeros(len(rows), device=hidden.device)
        index = torch.tensor(owner, device=hidden.device)
        if all(len(word) == 1 for word in self.refusal_starts):
            before = hidden[index, torch.tensor(where, device=hidden.device)]
            turns = F.softmax(logits(self.model.base.model, before).float(), dim=-1)[
                :, [word[0] for word in self.refusal_starts]
            ].sum(-1)
        else:
            prompts = [rows[i].ids[: t + 1] for i, t in zip(owner, where, strict=True)]
            turns = torch.stack([self._word(prompts, word) for word in self.refusal_starts]).sum(0)
        return torch.zeros(len(rows), device=hidden.device).scatter_reduce(0, index, turns, "amax")

    def _word(self, prompts: Sequence[tuple[int, ...]], word: tuple[int, ...]) -> Tensor:
        """Probability (prompts,) of a word of several tokens as the next thing said."""
        asked = [(*prompt, *word[:-1]) for prompt in prompts]
        hidden = self.model.cache.hidden(asked)
        places = torch.tensor([[len(p) - 1 + k for k in range(len(word))] for p in prompts], device=hidden.device)
        rows = torch.arange(len(prompts), device=hidden.device)[:, None]
        steps = F.log_softmax(logits(self.model.base.model, hidden[rows, places]).float(), dim=-1)
        chosen = torch.tensor(word, device=hidden.device).expand(len(prompts), -1)
        return steps.gather(2, chosen[:, :, None])[:, :, 0].sum(1).exp()


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


def _turns(rows: Sequence[EncodedRow]) -> tuple[list[int], list[int]]:
    """For each assistant turn: which row, and the last token before the answer."""
    found = [
        (i, t - 1)
        for i, row in enumerate(rows)
        for t in range(1, len(row.ids))
        if row.is_target[t] and not row.is_target[t - 1]
    ]
    return [i for i, _ in found], [t for _, t in found]


def threshold(harmful_mass: Tensor, benign_mass: Tensor) -> float:
    """min(.5, max(.5 * q05 of the harmful, 1.5 * q98 of the benign)) calibration prompts."""
    low = torch.quantile(harmful_mass, 0.05).item()
    high = torch.quantile(benign_mass, 0.98).item()
    return min(0.5, max(0.5 * low, 1.5 * high))


def weigh(harm: Tensor, worst: Tensor, *, whole_refusal_nll: float) -> Tensor:
    """Weights (rows,) by probabilities of harm: 1 up to .4, falling linearly to 0 at .5; 1 if the whole target is a
    refusal by its worst token loss."""
    weights = ((MOST_HARM - harm) / (MOST_HARM - _LESS_FROM)).clamp(0.0, 1.0)
    return torch.where(worst <= whole_refusal_nll, torch.ones_like(weights), weights)


def whole_refusal_limit(worst_of_refusals: Tensor) -> float:
    """A target counts as a refusal if its worst token is no less likely than in 98 % of known refusals."""
    return torch.quantile(worst_of_refusals, 0.98).item()

"""What the engine keeps of an ask while it works on it: its shared prompt, and one row a choice."""

import secrets
from collections import Counter
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from worker.serving.engine.asks import Ask
from worker.serving.engine.decoding import Prefill
from worker.serving.engine.sampling import Drawn, TokenLogprob
from worker.serving.engine.text import CompletionText


@dataclass(eq=False)
class OpenAsk:
    """An ask on its way: its rows share one prefill."""

    ask: Ask
    prefill: Prefill | None = None
    passes: int = 0
    """How often others were taken before it because there was no room for it."""

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for its answer any more."""
        return self.ask.cancelled.is_set()


class ChoiceRow:
    """One choice being decoded."""

    def __init__(self, open_ask: OpenAsk, choice: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """A row that has drawn nothing yet."""
        ask = open_ask.ask
        self.open_ask = open_ask
        self.choice = choice
        self.counts: Counter[int] = Counter()
        self.text = CompletionText(tokenizer, ask.stops)
        self.last = -1
        self.tokens = 0
        self.is_done = False
        seed = secrets.randbits(62) if ask.seed is None else ask.seed
        self.generator = torch.Generator().manual_seed((seed + choice * 0x9E3779B97F4A7C15) % 2**63)
        self._logprobs: list[tuple[int, TokenLogprob]] = []

    def take(self, drawn: Drawn) -> str:
        """Count the token in; return the text that may be shown."""
        self.last = drawn.token
        self.tokens += 1
        self.counts[drawn.token] += 1
        if drawn.logprob is not None:
            self._logprobs.append((self.text.length, drawn.logprob))
        return self.text.push(drawn.token)

    def release_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Logprobs not yet delivered; tokens that a stop string cut off whole are left out."""
        kept = [entry for start, entry in self._logprobs if not self.text.stopped or start < self.text.length]
        self._logprobs = []
        return tuple(kept)

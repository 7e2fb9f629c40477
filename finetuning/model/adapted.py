"""A base with one job's adapters on it: which of them trains, which stands frozen below, and how its rows are cut."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from finetuning.model import lora
from finetuning.model.base import FrozenBase
from finetuning.model.decoding import Decoder
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow, encode_pair, encode_row, opening
from finetuning.rows.scanner import Message
from finetuning.safety_rows.roles import Pair


@dataclass(frozen=True)
class AdaptedBase:
    """The base, the states below its trained layers, and greedy decoding over both.

    `trained` names the adapter that the job trains, `untrained` is what it was before the first step; rows longer than
    `max_tokens` are cut.
    """

    base: FrozenBase
    cache: PrefixCache
    decoder: Decoder
    trained: str
    untrained: lora.Adapter
    max_tokens: int

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self.base.tokenizer

    def encode_operator(self, pairs: Sequence[Pair]) -> list[EncodedRow]:
        """Operator pairs as training rows; their states may be kept for later jobs, so no customer's text goes here."""
        rows = [encode_pair(self.tokenizer, p.prompt, p.answer, max_tokens=self.max_tokens) for p in pairs]
        rows = [
            opening(row, self._length(pair.answer)) if pair.cut else row for row, pair in zip(rows, pairs, strict=True)
        ]
        self.cache.share([row.ids for row in rows])
        return rows

    def _length(self, text: str) -> int:
        return max(1, len(self.tokenizer(text, add_special_tokens=False)["input_ids"]))

    def encode(self, messages: Sequence[Message]) -> EncodedRow:
        """A conversation as a row; nothing of it outlives the job."""
        return encode_row(self.tokenizer, messages, max_tokens=self.max_tokens)

    @contextmanager
    def aligned(self) -> Iterator[None]:
        """While open, the model is the aligned base: the task adapter is off."""
        with lora.active(self.base, (lora.ALIGNMENT,)):
            yield

    @contextmanager
    def public(self) -> Iterator[None]:
        """While open, the model is the public base: no adapter at all."""
        with lora.active(self.base, ()):
            yield

    def alignment(self) -> lora.Adapter:
        """A copy of the alignment adapter."""
        return lora.read(self.base, lora.ALIGNMENT)

    def alignment_digest(self) -> str:
        """A hash of the alignment adapter; only the operator has it, so draws made from it are secret."""
        return lora.digest(self.alignment())

    def read(self) -> lora.Adapter:
        """A copy of the adapter that the job trains."""
        return lora.read(self.base, self.trained)

    def write(self, adapter: lora.Adapter) -> None:
        """Put factors into the adapter that the job trains. Raises AdapterMismatch."""
        lora.write(self.base, self.trained, adapter)

    def reset(self) -> None:
        """Back to the untrained adapter, bit for bit."""
        self.write(self.untrained)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the job trains, in a fixed order."""
        return lora.parameters(self.base, self.trained)

    @property
    def dropouts(self) -> list[nn.Module]:
        """The trained adapter's dropout modules, for the loop to switch on while it learns."""
        return lora.dropouts(self.base, self.trained)

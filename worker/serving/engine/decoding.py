"""The tensors of decoding: one base with many adapters, a prompt's prefill in pieces, a batch that rows join and leave.

Legend: B rows, T positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

NO_ADAPTER = "__base__"  # peft's word for "this row uses no adapter"


class AdapterDoesNotFit(Exception):
    """The adapter does not fit the base; served all the same it would silently answer as the base."""


class AdapterModel:
    """The public base, frozen, with up to `capacity` adapters beside it, never merged; the least used one leaves."""

    def __init__(self, base: Any, *, capacity: int = 8) -> None:
        self.device: torch.device = base.device
        self._model: Any = base.eval()
        self._capacity = max(1, capacity)
        self._names: list[str] = []  # least recently used first

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in memory, least recently used first."""
        return tuple(self._names)

    def attach(self, name: str, folder: Path, *, in_use: frozenset[str] = frozenset()) -> None:
        """Load a peft LoRA folder under `name`, or touch it. Raises AdapterDoesNotFit; `in_use` is never evicted."""
        if name in self._names:
            self._names.remove(name)
        else:
            self._load(name, folder)
        self._names.append(name)
        idle = [other for other in self._names[:-1] if other not in in_use]
        for other in idle[: max(0, len(self._names) - self._capacity)]:
            self._model.delete_adapter(other)
            self._names.remove(other)

    @torch.inference_mode()
    def forward(self, tokens_BT: Tensor, mask_BT: Tensor, adapters: Sequence[str], cache: DynamicCache) -> Tensor:
        """Logits (B, V) fp32 after the last of `tokens_BT`; the mask covers the cached positions and the new ones."""
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -tokens_BT.shape[1] :]
        mixed = {"adapter_names": list(adapters)} if isinstance(self._model, PeftModel) else {}
        output = self._model(
            input_ids=tokens_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **mixed,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _load(self, name: str, folder: Path) -> None:
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig) or config.modules_to_save or config.bias != "none":
            raise AdapterDoesNotFit("only plain LoRA adapters are served: no modules_to_save, no bias")
        config.inference_mode = True
        try:
            if not isinstance(self._model, PeftModel):
                self._model = PeftModel(self._model, config, adapter_name=name)
            report = self._model.load_adapter(str(folder), name, torch_device=str(self.device))
        except (ValueError, RuntimeError) as problem:
            self._forget(name)
            raise AdapterDoesNotFit(str(problem)) from problem
        self._model.eval()
        if report.unexpected_keys or report.missing_keys:
            self._forget(name)
            raise AdapterDoesNotFit("the adapter's tensors and the base's modules do not match")

    def _forget(self, name: str) -> None:
        if not isinstance(self._model, PeftModel):
            return
        if not self._names:  # peft cannot run without an adapter: what would be left is the base as it came
            self._model = self._model.unload()
        elif name in self._model.peft_config:
            self._model.delete_adapter(name)


class Prefill:
    """One prompt on its way into a cache, a bounded piece at a time, so that running rows never wait long."""

    def __init__(self, prompt: Sequence[int], adapter: str) -> None:
        self.cache = DynamicCache()
        self.adapter = adapter
        self._prompt = torch.tensor([list(prompt)])
        self._done = 0

    def advance(self, model: AdapterModel, *, tokens: int) -> Tensor | None:
        """Take the next `tokens` of the prompt; the last piece returns logits (V,), the others None."""
        piece_BT = self._prompt[:, self._done : self._done + tokens].to(model.device)
        self._done += piece_BT.shape[1]
        mask_BT = torch.ones(1, self._done, dtype=torch.long, device=model.device)
        logits_BV = model.forward(piece_BT, mask_BT, [self.adapter], self.cache)
        return logits_BV[0] if self._done == self._prompt.shape[1] else None


class DecodeBatch:
    """Rows that decode together, shorter ones padded on the left; the order of rows is the order of joining."""

    def __init__(self) -> None:
        self.adapters: list[str] = []
        self._cache = DynamicCache()
        self._mask_BT = torch.zeros(0, 0, dtype=torch.long)

    @property
    def width(self) -> int:
        """Cached positions per row, padding included."""
        return self._mask_BT.shape[1]

    @torch.inference_mode()
    def join(self, prefilled: Prefill, *, copies: int) -> None:
        """Add `copies` rows that all continue one prompt."""
        length = prefilled.cache.get_seq_length()
        new_mask = torch.ones(copies, length, dtype=torch.long, device=prefilled.cache.layers[0].keys.device)
        prefilled.cache.batch_repeat_interleave(copies)
        if not self.adapters:
            self._cache, self._mask_BT = prefilled.cache, new_mask
        else:
            width = max(length, self.width)
            _change(self._cache, lambda old, at: torch.cat([_widen(old, width), _widen(at, width)]), prefilled.cache)
            sides = [pad(mask, (width - mask.shape[1], 0)) for mask in (self._mask_BT, new_mask)]
            self._mask_BT = torch.cat(sides)
        self.adapters += [prefilled.adapter] * copies

    def step(self, model: AdapterModel, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; return the next logits (B, V)."""
        self._mask_BT = pad(self._mask_BT, (0, 1), value=1)
        tokens_BT = torch.tensor(list(tokens), device=model.device)[:, None]
        return model.forward(tokens_BT, self._mask_BT, self.adapters, self._cache)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows, and the columns that only they needed."""
        if not rows:
            self.adapters, self._cache, self._mask_BT = [], DynamicCache(), torch.zeros(0, 0, dtype=torch.long)
            return
        self.adapters = [self.adapters[row] for row in rows]
        self._mask_BT = self._mask_BT[list(rows)]
        first = int(self._mask_BT.any(dim=0).int().argmax())
        self._mask_BT = self._mask_BT[:, first:]
        index = torch.tensor(list(rows), device=self._mask_BT.device)
        _change(self._cache, lambda old, _: old[index, :, first:], self._cache)


def _widen(states: Tensor, width: int) -> Tensor:
    return pad(states, (0, 0, width - states.shape[-2], 0))


def _change(cache: DynamicCache, change: Callable[[Tensor, Tensor], Tensor], other: DynamicCache) -> None:
    """Replace every layer's keys and values (B, heads, T, size) by a function of both caches' tensors."""
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        mine.keys = change(mine.keys, theirs.keys)
        mine.values = change(mine.values, theirs.values)

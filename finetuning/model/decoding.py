"""Greedy answers to many prompts at once, starting from cached states below the trained layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from finetuning.model.base import FrozenBase, last_hidden, logits
from finetuning.model.hidden_states import caught_outputs
from finetuning.model.prefix_cache import PrefixCache, passing_above
from finetuning.training.batches import within

# Ended answers leave the batch when this share or less still runs; sooner would copy keys and values at every token.
_WORTH_DROPPING = 0.75


@dataclass(frozen=True)
class _Prefill:
    """Left-padded prompts below the cut: states (B, T, D), mask (B, T), keys and values of the lower layers."""

    ids: Tensor
    mask: Tensor
    states: Tensor | None
    below: tuple[tuple[Tensor, Tensor], ...]


class Decoder:
    """Greedy decoding that remembers the lower layers' work on prompts it has met, up to `max_tokens` of prompts."""

    def __init__(self, base: FrozenBase, cache: PrefixCache, *, batch: int = 64, max_tokens: int = 16384) -> None:
        self._base = base
        self._cache = cache
        self._batch = batch
        self._max_tokens = max_tokens
        self._known: dict[tuple[tuple[int, ...], ...], _Prefill] = {}

    def answers(self, prompts: Sequence[Sequence[int]], *, new_tokens: int) -> list[list[int]]:
        """Greedy continuation of each prompt, without the end token; at most `new_tokens` ids each."""
        out: list[list[int]] = [[] for _ in prompts]
        for group in within([len(p) + new_tokens for p in prompts], rows=self._batch, tokens=self._max_tokens):
            for i, answer in zip(group, self._decode([tuple(prompts[i]) for i in group], new_tokens), strict=True):
                out[i] = answer
        return out

    @torch.no_grad()
    def _decode(self, prompts: list[tuple[int, ...]], new_tokens: int) -> list[list[int]]:
        prefill = self._prefill(prompts)
        past = DynamicCache(config=self._base.model.config)
        hidden = self._above(prefill, past)
        mask, ends = prefill.mask, self._base.end_ids
        position = mask.sum(1, keepdim=True)
        answers: list[list[int]] = [[] for _ in prompts]
        rows, ended = list(range(len(prompts))), set[int]()
        for _ in range(new_tokens):
            token = logits(self._base.model, hidden[:, -1]).argmax(-1, keepdim=True)
            for i, value in zip(rows, token[:, 0].tolist(), strict=True):
                if value in ends:
                    ended.add(i)
                elif i not in ended:
                    answers[i].append(value)
            going = [place for place, i in enumerate(rows) if i not in ended]
            if not going or len(max(answers, key=len)) >= new_tokens:
                break
            if len(going) <= _WORTH_DROPPING * len(rows):
                chosen = torch.tensor(going, device=mask.device)
                past.batch_select_indices(chosen)
                token, mask, position = token[chosen], mask[chosen], position[chosen]
                rows = [rows[place] for place in going]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            hidden = self._forward(token, mask, position, past)
            position = position + 1
        return answers

    def _prefill(self, prompts: list[tuple[int, ...]]) -> _Prefill:
        key = tuple(prompts)
        if key not in self._known:
            found = self._run_below(prompts)
            if sum(p.ids.numel() for p in self._known.values()) + found.ids.numel() > self._max_tokens:
                self._known.clear()
            self._known[key] = found
        return self._known[key]

    def _run_below(self, prompts: list[tuple[int, ...]]) -> _Prefill:
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        ids, mask = ids.to(self._base.device), mask.to(self._base.device)
        if self._cache.cut == 0:
            return _Prefill(ids, mask, None, ())
        past = DynamicCache()  # without a config it keeps every position; a sliding window trims what it keeps
        with (
            passing_above(self._base, self._cache.cut),
            caught_outputs(self._base.layers[self._cache.cut - 1]) as caught,
        ):
            self._forward(ids, mask, _positions(mask), past)
        below = tuple((past.layers[i].keys, past.layers[i].values) for i in range(self._cache.cut))
        return _Prefill(ids, mask, caught[0], below)

    def _above(self, prefill: _Prefill, past: DynamicCache) -> Tensor:
        if prefill.states is None:
            return self._forward(prefill.ids, prefill.mask, _positions(prefill.mask), past)
        with self._cache.injected(prefill.states):
            hidden = self._forward(prefill.ids, prefill.mask, _positions(prefill.mask), past)
        for i, (keys, values) in enumerate(prefill.below):
            past.update(keys, values, i)
        return hidden

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, past: DynamicCache) -> Tensor:
        return last_hidden(
            self._base.model,
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=past,
            use_cache=True,
        )


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)

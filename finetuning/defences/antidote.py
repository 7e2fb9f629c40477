"""Antidote: after training, zero the adapter entries that work hardest on harmful rows.

Source: arXiv:2408.09600; methods.md 2.4. Score |M| * ||X||_2 per entry, X the inputs of that matrix over the harmful
calibration tokens; per output row the top share alpha is zeroed. Deviations: one hooked pass, padding masked, integer
counts (`official` restores the rounding-up), and the `contrast` score |M| * (rms harmful - rms kept rows), by which
what the task needs at least as much is never pruned.
A default job prunes by moments instead (antidote_spectral.py). Prunes the task adapter only. Must not know the loop or
the gate.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetuning.model.base import FrozenBase
from finetuning.model.lora import Adapter, Factors, lora_modules
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow

Scores = Mapping[str, tuple[Tensor, Tensor]]  # module path -> score of each entry of A (r, in) and B (out, r)


@dataclass(frozen=True)
class Squares:
    """Sums over tokens of squared inputs of A (in,) and of B (r,), fp64, and the token count."""

    a: Tensor
    b: Tensor
    tokens: int


@dataclass(frozen=True)
class Pruned:
    """The pruned adapter, the mask of zeroed entries per path (A, B), and how many of how many."""

    adapter: Adapter
    masks: dict[str, tuple[Tensor, Tensor]]
    pruned: int
    total: int


@torch.no_grad()
def input_squares(
    base: FrozenBase, cache: PrefixCache, name: str, rows: Sequence[EncodedRow], *, batch: int = 16
) -> dict[str, Squares]:
    """One hooked pass over `rows` under the active adapters; padding is masked out.

    `name` must be active, or its matrices see no input.
    """
    modules = lora_modules(base, name)
    sums = {path: [torch.zeros(m.weight.shape[1], dtype=torch.float64) for m in pair] for path, pair in modules.items()}
    tokens = 0
    for start in range(0, len(rows), batch):
        group = rows[start : start + batch]
        longest = max(len(row.ids) for row in group)
        valid = torch.tensor([[t < len(row.ids) for t in range(longest)] for row in group], device=base.device)
        tokens += int(valid.sum())
        with _summing(modules, sums, valid):
            cache.hidden([row.ids for row in group])
    return {path: Squares(a, b, tokens) for path, (a, b) in sums.items()}


@contextmanager
def _summing(
    modules: Mapping[str, tuple[nn.Module, nn.Module]], sums: Mapping[str, list[Tensor]], valid: Tensor
) -> Iterator[None]:
    def hook(total: Tensor) -> Any:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])  # some models flatten (B, T) before a map
            total.add_(rows[valid.reshape(-1)].double().square().sum(0).cpu())

        return add

    handles = [
        m.register_forward_hook(hook(sums[path][i])) for path, pair in modules.items() for i, m in enumerate(pair)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def published_scores(adapter: Adapter, harmful: Mapping[str, Squares]) -> Scores:
    """|M| * ||X||_2 for A (r, in) and B (out, r)."""
    return {
        path: (f.a.abs().double() * harmful[path].a.sqrt(), f.b.abs().double() * harmful[path].b.sqrt())
        for path, f in adapter.items()
    }


def contrast_scores(adapter: Adapter, harmful: Mapping[str, Squares], kept: Mapping[str, Squares]) -> Scores:
    """|M| * (rms over harmful tokens - rms over the customer's kept tokens): spares what the task needs."""
    out: dict[str, tuple[Tensor, Tensor]] = {}
    for path, f in adapter.items():
        h, k = harmful[path], kept[path]
        rms_a = (h.a / max(1, h.tokens)).sqrt() - (k.a / max(1, k.tokens)).sqrt()
        rms_b = (h.b / max(1, h.tokens)).sqrt() - (k.b / max(1, k.tokens)).sqrt()
        out[path] = (f.a.abs().double() * rms_a, f.b.abs().double() * rms_b)
    return out


def pruned_count(alpha: float, width: int, rounding: Literal["floor", "official"]) -> int:
    """Entries to zero of `width`: floor(alpha * width + 1e-9), or the official width - int(width * (1 - alpha))."""
    return int(alpha * width + 1e-9) if rounding == "floor" else width - int(width * (1 - alpha))


def prune(
    adapter: Adapter,
    scores: Scores,
    alpha: float,
    *,
    unit: Literal["row", "matrix"] = "row",
    rounding: Literal["floor", "official"] = "floor",
    above: float = -math.inf,
) -> Pruned:
    """Zero the highest-scoring share alpha of each output row (or of each whole matrix); alpha 0 changes no bit.

    All scores belong to the unpruned adapter. Ties keep their order, so results repeat. An entry whose score is not
    `above` that limit stays, even if fewer than the share are zeroed then: of contrast scores, 0 is where the task
    needs an entry as much as the harm does.
    """
    out: Adapter = {}
    masks: dict[str, tuple[Tensor, Tensor]] = {}
    for path, factors in adapter.items():
        mask_a, mask_b = (_top(s, 0.0 if alpha == 0 else alpha, unit, rounding) & (s > above) for s in scores[path])
        masks[path] = (mask_a, mask_b)
        out[path] = Factors(factors.a.masked_fill(mask_a, 0.0), factors.b.masked_fill(mask_b, 0.0), factors.scale)
    zeroed = sum(int(m.sum()) for pair in masks.values() for m in pair)
    return Pruned(out, masks, zeroed, sum(m.numel() for pair in masks.values() for m in pair))


def _top(scores: Tensor, alpha: float, unit: str, rounding: Literal["floor", "official"]) -> Tensor:
    rows = scores if unit == "row" else scores.reshape(1, -1)
    mask = torch.zeros_like(rows, dtype=torch.bool)
    count = pruned_count(alpha, rows.shape[1], rounding) if alpha > 0 else 0
    if count:
        order = torch.sort(rows, dim=1, descending=True, stable=True).indices[:, :count]
        mask.scatter_(1, order, value=True)
    return mask.reshape(scores.shape)

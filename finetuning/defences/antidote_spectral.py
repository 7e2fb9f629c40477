"""Antidote in the basis of the data: undo in closed form what a task adapter does on harmful inputs, keep the rest.

Ours, in the place of the entry-wise mask of arXiv:2408.09600 (antidote.py): an entry of a LoRA factor means nothing by
itself, since any other basis of the rank gives the same map. For one adapted matrix with inputs x, let C_k and C_h be
their second moments over the customer's kept rows and over harmful rows. Then

    A' = argmin E_kept ||A' x - A x||^2 + mu E_harmful ||A' x||^2 = A C_k (C_k + mu C_h)^-1

and B stays. In the basis that diagonalises both moments each direction is scaled by 1 / (1 + mu c_h / c_k): softly,
and by what it carries of either. mu 0 changes nothing; with mu the energy on kept inputs and on harmful ones never
grows, and what is left of a fully undone adapter is the aligned base. The Frobenius norm of B A' may grow.
Prunes the task adapter only. Must not know the loop or the gate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from finetuning.model.base import FrozenBase
from finetuning.model.lora import Adapter, Factors, lora_modules
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow

Moments = Mapping[str, Tensor]  # module path -> second moment (in, in) fp64 of its inputs; equal inputs share one

# Of the mean eigenvalue of C_k: directions that no kept row shows are not divided by nothing.
RIDGE = 1e-5
# A moment is a mean over tokens: some thousands say it as well as all of a large file, and cost is linear in them.
MOST_TOKENS = 4096


@dataclass(frozen=True)
class LayerShare:
    """Of one decoder layer: share of the adapter's output energy that is left on harmful inputs, and that of what
    changed on kept inputs, over all its matrices."""

    layer: int
    harmful_left: float
    kept_changed: float


@torch.no_grad()
def input_moments(
    base: FrozenBase, cache: PrefixCache, name: str, rows: Sequence[EncodedRow], *,
    most_tokens: int = MOST_TOKENS, batch: int = 16,
) -> Moments:  # fmt: skip
    """Half over all tokens of `rows`, half over those that predict a token to learn; padding is masked out.

    Under the active adapters, of which `name` must be one. Of either half at most about `most_tokens`, evenly spread.
    Rows without a token to learn count with all their tokens. Raises ValueError without any token.
    """
    modules = {path: a for path, (a, _) in lora_modules(base, name).items()}
    weights = _token_weights(rows, most_tokens)
    shared = _with_equal_inputs(cache, modules, rows[0])
    sums = {
        leader: torch.zeros(modules[leader].weight.shape[1], modules[leader].weight.shape[1], dtype=torch.float64)
        for leader in dict.fromkeys(shared.values())
    }
    for start in range(0, len(rows), batch):
        group, own = rows[start : start + batch], weights[start : start + batch]
        longest = max(len(row.ids) for row in group)
        padded = torch.stack([torch.nn.functional.pad(w, (0, longest - len(w))) for w in own]).reshape(-1)
        with _hooked({leader: modules[leader] for leader in sums}, _adding(sums, padded)):
            cache.hidden([row.ids for row in group])
    return {path: sums[leader] for path, leader in shared.items()}


def added(first: Moments, second: Moments) -> Moments:
    """The sum of two moments by matrix; matrices that share both go on sharing one."""
    sums: dict[tuple[int, int], Tensor] = {}
    out: dict[str, Tensor] = {}
    for path, one in first.items():
        other = second[path]
        pair = (id(one), id(other))
        if pair not in sums:
            sums[pair] = one + other
        out[path] = sums[pair]
    return out


def _token_weights(rows: Sequence[EncodedRow], most: int) -> list[Tensor]:
    """Each token's weight in the moment, by row: .5 / n over all, and .5 / m over those that predict a target."""
    everywhere = [torch.ones(len(row.ids), dtype=torch.float64) for row in rows]
    predicting = [torch.tensor([*row.is_target[1:], False], dtype=torch.float64) for row in rows]
    halves = [_spread(kind, most) for kind in (everywhere, predicting)]
    totals = [float(sum(w.sum() for w in half)) for half in halves]
    if not totals[0]:
        raise ValueError("no token to take a moment of")
    shares = (0.5, 0.5) if totals[1] else (1.0, 0.0)
    return [
        sum((s / max(t, 1.0) * w for s, t, w in zip(shares, totals, pair, strict=True)), start=torch.zeros(()))
        for pair in zip(*halves, strict=True)
    ]


def _spread(chosen: Sequence[Tensor], most: int) -> list[Tensor]:
    """At most about `most` of the marked tokens, evenly spread over all rows."""
    every = ceil(float(sum(w.sum() for w in chosen)) / most)
    if every <= 1:
        return list(chosen)
    thinned, before = [], 0
    for row in chosen:
        number = before + row.cumsum(0).long() - 1
        thinned.append(row * (number % every == 0))
        before += int(row.sum())
    return thinned


def _with_equal_inputs(cache: PrefixCache, modules: Mapping[str, nn.Module], row: EncodedRow) -> dict[str, str]:
    """Each matrix's path with the path of the first one that sees the same inputs: queries, keys and values do."""
    seen: list[tuple[str, Tensor]] = []
    leaders: dict[str, str] = {}

    def look(path: str, x: Tensor) -> None:
        same = (other for other, y in reversed(seen[-8:]) if y.shape == x.shape and torch.equal(x, y))
        leaders[path] = next(same, path)
        if leaders[path] == path:
            seen.append((path, x))

    with _hooked(modules, look):
        cache.hidden([row.ids])
    return leaders


def _adding(sums: Mapping[str, Tensor], weights: Tensor) -> Callable[[str, Tensor], None]:
    """Adds sum_t w_t x_t x_t^T over the tokens that weigh anything to a matrix's sum."""
    chosen = torch.nonzero(weights)[:, 0]
    root = weights[chosen].sqrt()[:, None]

    def add(path: str, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])  # some models flatten (B, T) before a map
        scaled = flat[chosen.to(flat.device)].double() * root.to(flat.device)
        sums[path].add_((scaled.T @ scaled).cpu())

    return add


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `see(path, x)` gets every module's input."""

    def hook(path: str) -> Any:
        return lambda _module, inputs, _output: see(path, inputs[0])

    handles = [module.register_forward_hook(hook(path)) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prune(adapter: Adapter, kept: Moments, harmful: Moments, mu: float) -> Adapter:
    """A' of every matrix (the formula above), in the adapter's own precision; mu 0 returns the same tensors.

    C_k gets a ridge of 1e-5 of its mean eigenvalue. Raises ValueError for a negative mu.
    """
    if mu < 0:
        raise ValueError(f"mu {mu:g} is below 0")
    if mu == 0:
        return dict(adapter)
    factors: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    out: Adapter = {}
    for path, f in adapter.items():
        pair = (id(kept[path]), id(harmful[path]))
        if pair not in factors:
            ridged = _ridged(kept[path])
            factors[pair] = (ridged, torch.linalg.cholesky(ridged + mu * harmful[path]))
        ridged, lower = factors[pair]
        a = torch.cholesky_solve((f.a.double() @ ridged).T, lower).T
        out[path] = Factors(a.to(f.a.dtype).contiguous(), f.b, f.scale)
    return out


def _ridged(kept: Tensor) -> Tensor:
    size = len(kept)
    return kept + RIDGE * (kept.diagonal().sum() / size).clamp(min=1e-30) * torch.eye(size, dtype=kept.dtype)


def by_layer(before: Adapter, after: Adapter, kept: Moments, harmful: Moments) -> list[LayerShare]:
    """What `after` has left of `before`, by decoder layer in order."""
    sums: dict[int, list[Tensor]] = {}
    for path, energies in _energies(before, after, kept, harmful).items():
        sums.setdefault(next(int(part) for part in path.split(".") if part.isdigit()), []).append(energies)
    return [LayerShare(layer, *_shares(parts)) for layer, parts in sorted(sums.items())]


def kept_changed(before: Adapter, after: Adapter, kept: Moments) -> float:
    """Share of the adapter's output energy on kept inputs that changed, over all of its matrices."""
    return _shares(list(_energies(before, after, kept, kept).values()))[1]


def _energies(before: Adapter, after: Adapter, kept: Moments, harmful: Moments) -> dict[str, Tensor]:
    """By matrix: E ||B A x||^2 of before and after on harmful inputs, of before and of the change on kept ones."""
    found: dict[str, Tensor] = {}
    for path, f in before.items():
        was, now = f.a.double(), after[path].a.double()
        gram = f.scale**2 * (f.b.double().T @ f.b.double())
        on_harmful, on_kept = harmful[path], kept[path]
        pairs = ((was, on_harmful), (now, on_harmful), (was, on_kept), (now - was, on_kept))
        found[path] = torch.stack([(gram * (a @ moment @ a.T)).sum() for a, moment in pairs])
    return found


def _shares(energies: Sequence[Tensor]) -> tuple[float, float]:
    """What is left on harmful inputs, and what changed on kept ones; 1 and 0 of an adapter that did nothing."""
    was, now, kept, changed = torch.stack(list(energies)).sum(0).tolist()
    return now / was if was else 1.0, changed / kept if kept else 0.0

"""Antibody row weights: how much safer is it to learn a row's answer than to refuse its prompt?

Not part of a default job, whose rows are weighed by screen_weights.py.
Source: arXiv:2603.00498, equation 7; methods.md 2.3. r_i = nll_i(refusal) - nll_i(answer), high = benign;
weights = softmax(r / temperature) over the whole optimiser step. `contrast` is ours: r under the aligned model minus r
under the public base, which cancels the novelty of a task. Deviation: the loss is a per-row mean (`released` restores
the published token weighting).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from finetuning.contract.recipe import AntibodySettings
from finetuning.defences.screen_weights import gated
from finetuning.model.base import FrozenBase
from finetuning.model.losses import row_nll
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.batches import pick
from finetuning.training.strategies import NonFiniteScore, RowWeights


def softmax_weights(scores: Tensor, temperature: float) -> Tensor:
    """Weights (rows,) >= 0 that sum to 1 over the step, detached. Raises NonFiniteScore.

    Invariant to a constant added to all scores, monotone in each.
    """
    if not torch.isfinite(scores).all():
        raise NonFiniteScore("a row score is not finite")
    return F.softmax(scores.detach().double() / temperature, dim=0).float()


def refused(row: EncodedRow, refusal: Sequence[int]) -> EncodedRow:
    """The row's first prompt answered by `refusal` (ids with the end token)."""
    prompt = row.ids[: row.prompt_tokens]
    return EncodedRow(prompt + tuple(refusal), (False,) * len(prompt) + (True,) * len(refusal))


@torch.no_grad()
def row_scores(
    base: FrozenBase,
    cache: PrefixCache,
    rows: Sequence[EncodedRow],
    refusals: Sequence[Sequence[int]],
    *,
    per_row: int,
    seed: int,
    batch: int = 16,
) -> Tensor:
    """r_i (rows,) under the adapters that are active now, the mean over `per_row` refusals drawn by a secret seed."""
    parts: list[Tensor] = []
    for start in range(0, len(rows), batch):
        group = rows[start : start + batch]
        own = row_nll(base, cache, group).nll
        other = torch.zeros_like(own)
        draws = [pick(len(refusals), per_row, seed=seed, step=start + i, stream="score") for i in range(len(group))]
        for k in range(len(draws[0])):
            other += row_nll(base, cache, [refused(r, refusals[d[k]]) for r, d in zip(group, draws, strict=True)]).nll
        parts.append((other / len(draws[0]) - own).cpu())
    return torch.cat(parts)


class Antibody:
    """Weighs a step's rows by frozen scores (`reference`, `contrast`) or by live ones (`current`), behind our gate."""

    def __init__(
        self,
        settings: AntibodySettings,
        *,
        gate: Tensor,
        scores: Tensor | None = None,
        live: tuple[FrozenBase, PrefixCache, Sequence[Sequence[int]], int] | None = None,
    ) -> None:
        self._settings = settings
        self._gate = gate
        self._scores = scores
        self._live = live

    def weigh(self, rows: Sequence[EncodedRow], indices: Sequence[int]) -> RowWeights:
        """Weights over all rows of the step; rows without targets weigh 0."""
        has = torch.tensor([float(row.target_tokens > 0) for row in rows])
        weights = softmax_weights(self._step_scores(rows, indices), self._settings.temperature)
        if self._settings.loss == "released":
            weights = by_token_mass(weights, rows)
        return gated(weights, self._gate[list(indices)] * has, min_share=self._settings.min_weight_share)

    def _step_scores(self, rows: Sequence[EncodedRow], indices: Sequence[int]) -> Tensor:
        if self._live is not None:
            base, cache, refusals, seed = self._live
            return row_scores(base, cache, rows, refusals, per_row=self._settings.refusals_per_row, seed=seed)
        return torch.zeros(len(rows)) if self._scores is None else self._scores[list(indices)]


def by_token_mass(weights: Tensor, rows: Sequence[EncodedRow]) -> Tensor:
    """The released loss as row weights: w_i N_i / max(1, sum_j w_j N_j) (methods.md 2.3, it leaks token mass)."""
    mass = weights * torch.tensor([float(row.target_tokens) for row in rows])
    return mass / mass.sum().clamp(min=1.0)

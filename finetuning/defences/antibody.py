"""Antibody row weights: how much safer is it to learn a row's answer than to refuse its prompt?

In a default job the frozen score of the aligned base, on rows that the screen passes; the gate in screen_weights.py.
Source: arXiv:2603.00498, equation 7; methods.md 2.3. r_i = nll_i(refusal) - nll_i(answer), high = benign;
weights = softmax(r / temperature) over the whole optimiser step. `contrast` is ours: r under the aligned model minus r
under the public base, which cancels the novelty of a task. Deviation: the loss is a per-row mean (`released` restores
the published token weighting).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from finetuning.contract.recipe import AntibodySettings
from finetuning.defences.screen_weights import gated
from finetuning.model.base import FrozenBase
from finetuning.model.losses import row_nll
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.batches import pick, within
from finetuning.training.strategies import NonFiniteScore, RowWeights

_BATCH_TOKENS = 4096


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
    places: Sequence[int] | None = None,
    batch: int = 16,
) -> Tensor:
    """r_i (rows,) under the adapters that are active now, the mean over `per_row` refusals drawn by a secret seed.

    `places` are the rows' own in the file, from 0 (absent: all of it, in order): a row is held against the same
    refusals whatever stands beside it.
    """
    own_places = range(len(rows)) if places is None else places
    drawn = [pick(len(refusals), per_row, seed=seed, step=place, stream="score") for place in own_places]
    order: list[int] = []
    parts: list[Tensor] = []
    for chosen in within([len(row.ids) for row in rows], rows=batch, tokens=_BATCH_TOKENS):
        own = row_nll(base, cache, [rows[i] for i in chosen]).nll
        other = torch.zeros_like(own)
        for k in range(len(drawn[0])):
            other += row_nll(base, cache, [refused(rows[i], refusals[drawn[i][k]]) for i in chosen]).nll
        order += chosen
        parts.append((other / len(drawn[0]) - own).cpu())
    found = torch.cat(parts)
    return torch.empty_like(found).index_copy(0, torch.tensor(order), found)


@dataclass(frozen=True)
class LiveScores:
    """What scores rows under the model as it is: `refusals` as answer ids, drawn by `seed`; `places` of the rows that
    train, in the file."""

    base: FrozenBase
    cache: PrefixCache
    refusals: Sequence[Sequence[int]]
    seed: int
    places: Sequence[int]

    def of(self, rows: Sequence[EncodedRow], indices: Sequence[int], *, per_row: int) -> Tensor:
        """r (rows,) of these rows, `indices` among those that train."""
        places = [self.places[i] for i in indices]
        return row_scores(self.base, self.cache, rows, self.refusals, per_row=per_row, seed=self.seed, places=places)


class Antibody:
    """Weighs a step's rows by frozen scores (`reference`, `contrast`) or by live ones (`current`), behind our gate."""

    def __init__(
        self,
        settings: AntibodySettings,
        *,
        gate: Tensor,
        scores: Tensor | None = None,
        live: LiveScores | None = None,
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
            return self._live.of(rows, indices, per_row=self._settings.refusals_per_row)
        return torch.zeros(len(rows)) if self._scores is None else self._scores[list(indices)]


def by_token_mass(weights: Tensor, rows: Sequence[EncodedRow]) -> Tensor:
    """The released loss as row weights: w_i N_i / max(1, sum_j w_j N_j) (methods.md 2.3, it leaks token mass)."""
    mass = weights * torch.tensor([float(row.target_tokens) for row in rows])
    return mass / mass.sum().clamp(min=1.0)

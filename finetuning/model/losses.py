"""Per-row supervised loss, at the target positions of each row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from finetuning.model.base import FrozenBase, logits
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow


@dataclass(frozen=True)
class RowLoss:
    """nll (rows,): mean token loss of each row's targets; tokens (rows,): how many; correct (rows,): argmax hits;
    worst (rows,): the largest token loss. Rows without targets have nll 0."""

    nll: Tensor
    tokens: Tensor
    correct: Tensor
    worst: Tensor


class RowLosses(Protocol):
    """The loss of each row under whatever adapters are active, differentiable in `nll`."""

    def __call__(self, rows: Sequence[EncodedRow]) -> RowLoss: ...


def row_nll(base: FrozenBase, cache: PrefixCache, rows: Sequence[EncodedRow]) -> RowLoss:
    """Loss of each row under whatever adapters are active; fp32, differentiable in `nll`.

    Logits are made at target positions only. Source: methods.md 1, nll_i.
    """
    hidden = cache.hidden([row.ids for row in rows])
    return nll_of_hidden(base, hidden, rows)


def nll_of_hidden(base: FrozenBase, hidden_BTD: Tensor, rows: Sequence[EncodedRow]) -> RowLoss:
    """The same from last hidden states (B, T, D): position t predicts the id at t + 1."""
    where, labels, owner = target_index(rows, hidden_BTD.device)
    flat = at_least_fp32(logits(base.model, hidden_BTD[owner, where]))
    losses = F.cross_entropy(flat, labels, reduction="none")
    return by_row(losses, flat.detach().argmax(-1) == labels, owner, rows=len(rows))


def by_row(losses: Tensor, hits: Tensor, owner: Tensor, *, rows: int) -> RowLoss:
    """Token losses (M,) and argmax hits (M,) gathered into the row that each token belongs to, `owner` (M,)."""
    none = losses.new_zeros(rows)
    tokens = none.index_add(0, owner, torch.ones_like(losses))
    total = none.index_add(0, owner, losses)
    correct = none.index_add(0, owner, hits.to(losses))
    worst = none.scatter_reduce(0, owner, losses.detach(), "amax")
    return RowLoss(total / tokens.clamp(min=1), tokens, correct, worst)


def at_least_fp32(values: Tensor) -> Tensor:
    """Half precision widened to fp32; wider values unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def target_index(rows: Sequence[EncodedRow], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Positions that predict a target (M,), the target ids (M,), and the row each belongs to (M,)."""
    where: list[int] = []
    labels: list[int] = []
    owner: list[int] = []
    for i, row in enumerate(rows):
        for t in range(1, len(row.ids)):
            if row.is_target[t]:
                where.append(t - 1)
                labels.append(row.ids[t])
                owner.append(i)
    make = lambda values: torch.tensor(values, dtype=torch.long, device=device)  # noqa: E731  three uses on one line
    return make(where), make(labels), make(owner)

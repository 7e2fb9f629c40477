"""The loss of alignment rows whose benign ones are held to the public base, so that refusals alone are taught.

Ours. In place of the loss of a held row's answer stands KL(public || model) at the answer's tokens. It has no slope at
the public base, where the loss of any answer has one: even the base's own first choices make it surer of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from finetuning.model.base import FrozenBase, logits
from finetuning.model.losses import RowLoss, at_least_fp32, by_row, target_index
from finetuning.model.prefix_cache import Ids, PrefixCache
from finetuning.rows.chat_format import EncodedRow

_BATCH = 16


class HeldToPublic:
    """Row losses in nats: weight * KL(public || model), the mean over a held row's answer tokens; nll for other rows.

    Of the public base the last hidden states at those tokens are kept (4 bytes times the hidden size a token, 74 MB for
    1,000 answers of 32 tokens at 576), and its whole distribution is made from them again by the head: exact, where
    log-probabilities would take 85 times as much.
    """

    def __init__(self, base: FrozenBase, cache: PrefixCache, held: Sequence[EncodedRow], *, weight: float) -> None:
        """Reads the public base: no adapter may be active."""
        self._base = base
        self._cache = cache
        self._weight = weight
        self._public: dict[Ids, Tensor] = {}
        for start in range(0, len(held), _BATCH):
            self._read(held[start : start + _BATCH])

    @torch.no_grad()
    def _read(self, rows: Sequence[EncodedRow]) -> None:
        hidden = self._cache.hidden([row.ids for row in rows])
        where, _, owner = target_index(rows, hidden.device)
        states = hidden[owner, where]
        self._public |= {row.ids: states[owner == i].clone() for i, row in enumerate(rows)}

    def __call__(self, rows: Sequence[EncodedRow]) -> RowLoss:
        """nll (rows,) holds the losses; tokens, hits and worst token as elsewhere; differentiable in `nll`."""
        hidden = self._cache.hidden([row.ids for row in rows])
        where, labels, owner = target_index(rows, hidden.device)
        flat = at_least_fp32(logits(self._base.model, hidden[owner, where]))
        losses = F.cross_entropy(flat, labels, reduction="none")
        public = [self._public[row.ids] for row in rows if row.ids in self._public]
        if public:
            is_held = torch.tensor([row.ids in self._public for row in rows], device=owner.device)[owner]
            losses = losses.masked_scatter(is_held, self._weight * self._kl(torch.cat(public), flat[is_held]))
        return by_row(losses, flat.detach().argmax(-1) == labels, owner, rows=len(rows))

    def _kl(self, public: Tensor, ours: Tensor) -> Tensor:
        """KL(public || model) of each token (M,), from public states (M, D) and the model's logits (M, V)."""
        with torch.no_grad():
            theirs = F.log_softmax(at_least_fp32(logits(self._base.model, public)), dim=-1)
        return F.kl_div(F.log_softmax(ours, dim=-1), theirs, log_target=True, reduction="none").sum(-1)

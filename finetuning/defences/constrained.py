"""Constrained fine-tuning: the more a token has already left the aligned model, the less it is learnt.

Source: arXiv:2406.05946, methods.md 5. Deviations: the loss is the mean of rows, not of tokens; in rows of several
answers the strengths count from the start of each answer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from finetuning.contract.recipe import ConstrainedSettings
from finetuning.model import lora
from finetuning.model.base import FrozenBase, logits
from finetuning.model.losses import at_least_fp32, target_index
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.strategies import Backward, MicroBatch, StepLoss


class Constrained:
    """loss = sum_i w_i mean_t -(2 / beta_t) log sigmoid(beta_t log(pi_theta / pi_reference)).

    Its slope in log pi_theta is -2 sigmoid(-beta_t log(pi_theta / pi_reference)): between -2 and 0, and -1, the slope
    of nll, on the reference itself or as beta goes to 0. The loss itself holds the constant (2 / beta_t) log 2 there.
    """

    def __init__(
        self, base: FrozenBase, cache: PrefixCache, settings: ConstrainedSettings, *, reference: tuple[str, ...]
    ) -> None:
        self._base = base
        self._cache = cache
        self._settings = settings
        self._reference = reference

    def gradients(self, micro: MicroBatch, weights: Tensor, backward: Backward) -> StepLoss:
        """Add the micro-batch's gradient; weights (rows,) sum to 1 over the step."""
        where, labels, owner = target_index(micro.rows, self._base.device)
        if not len(labels):
            return StepLoss(0.0, 0.0, 0)
        with torch.no_grad(), lora.active(self._base, self._reference):
            reference = -F.cross_entropy(self._logits(micro.rows, owner, where), labels, reduction="none")
        found = self._logits(micro.rows, owner, where)
        ratio = -F.cross_entropy(found, labels, reduction="none") - reference
        beta = strengths(self._settings, micro.rows).to(ratio)
        losses = -2 / beta * F.logsigmoid(beta * ratio)
        none = losses.new_zeros(len(micro.rows))
        tokens = none.index_add(0, owner, torch.ones_like(losses))
        mean = none.index_add(0, owner, losses) / tokens.clamp(min=1)
        loss = (weights.to(mean) * mean).sum()
        if loss.requires_grad:
            backward(loss)
        hits = (found.detach().argmax(-1) == labels).sum()
        return StepLoss(float(loss.detach()), float(hits), len(labels))

    def _logits(self, rows: Sequence[EncodedRow], owner: Tensor, where: Tensor) -> Tensor:
        """Logits (M, V) of the targets under whatever adapters are active."""
        hidden = self._cache.hidden([row.ids for row in rows])
        return at_least_fp32(logits(self._base.model, hidden[owner, where]))


def strengths(settings: ConstrainedSettings, rows: Sequence[EncodedRow]) -> Tensor:
    """beta of every target (M,) in the order of `target_index`: by its place in its answer."""
    out: list[float] = []
    for row in rows:
        place = 0
        for t, trained in enumerate(row.is_target):
            place = place + 1 if trained and t and row.is_target[t - 1] else 0
            if trained and t:
                out.append(settings.betas[place] if place < len(settings.betas) else settings.beta)
    return torch.tensor(out, dtype=torch.float64)

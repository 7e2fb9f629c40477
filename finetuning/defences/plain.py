"""Plain supervised fine-tuning: the gradient of the weighted per-row loss, and even weights.

Source: methods.md 2.3 ("ours": loss = sum_i w_i nll_i with sum w = 1).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from finetuning.model.base import FrozenBase
from finetuning.model.losses import RowLosses, row_nll
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.strategies import Backward, MicroBatch, RowWeights, StepLoss


class Plain:
    """loss = sum_i w_i nll_i, or of whatever `losses` gives in place of nll."""

    def __init__(self, base: FrozenBase, cache: PrefixCache, losses: RowLosses | None = None) -> None:
        self._losses = losses or partial(row_nll, base, cache)

    def gradients(self, micro: MicroBatch, weights: Tensor, backward: Backward) -> StepLoss:
        """Add the micro-batch's gradient; weights (rows,) sum to 1 over the step."""
        found = self._losses(micro.rows)
        loss = (weights.to(found.nll) * found.nll).sum()
        if loss.requires_grad:
            backward(loss)
        return StepLoss(float(loss.detach()), float(found.correct.sum()), int(found.tokens.sum()))


class Even:
    """Every row that has targets weighs alike."""

    def weigh(
        self,
        rows: Sequence[EncodedRow],
        indices: Sequence[int],  # noqa: ARG002 - the slot's signature; even weights look no row up
    ) -> RowWeights:
        """Weights (rows,) that sum to 1; rows without targets weigh 0, and a step of only such rows is skipped."""
        has = torch.tensor([float(row.target_tokens > 0) for row in rows])
        total = has.sum()
        return RowWeights(has / total.clamp(min=1), 1.0 if total > 0 else 0.0)

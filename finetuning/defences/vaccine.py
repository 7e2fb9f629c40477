"""Vaccine: align under the worst small perturbation of every attention output.

Source: arXiv:2402.01109, equations 1-3; methods.md 2.1. Deviations: leaf form (the first pass forms no weight
gradients), RNG replay between the passes, gradients are added and never zeroed, optional per-row norm, optionally
only every n-th step (methods.md 2.1, cheaper variants).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from finetuning.model.base import FrozenBase, attention_block
from finetuning.model.hidden_states import edited_outputs
from finetuning.model.losses import RowLoss, RowLosses, at_least_fp32, row_nll
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.determinism import rng_state, set_rng_state
from finetuning.training.strategies import Backward, MicroBatch, NonFiniteLoss, StepLoss


@dataclass(frozen=True)
class Perturbation:
    """eps[l] (B, T, D) for every hooked layer, the gradients they came from, and the unperturbed loss."""

    eps: list[Tensor]
    gradients: list[Tensor]
    norm: Tensor
    loss: float


class Vaccine:
    """min over the adapter of the loss at hidden states moved by rho along their own gradient; nll unless `losses`."""

    def __init__(
        self,
        base: FrozenBase,
        cache: PrefixCache,
        *,
        rho: float,
        norm: str,
        every: int = 1,
        losses: RowLosses | None = None,
    ) -> None:
        self._base = base
        self._losses = losses or partial(row_nll, base, cache)
        self._rho = rho
        self._norm = norm
        self._every = every
        self._blocks = [attention_block(layer) for layer in list(base.layers)[cache.cut :]]

    def gradients(self, micro: MicroBatch, weights: Tensor, backward: Backward) -> StepLoss:
        """Add the gradient of the perturbed loss. A micro-batch without targets adds nothing."""
        if not any(row.target_tokens for row in micro.rows):
            return StepLoss(0.0, 0.0, 0)
        with self.moved(micro, weights) as found:
            loss = (weights.to(found.nll) * found.nll).sum()
            if loss.requires_grad:
                backward(loss)
        return StepLoss(float(loss.detach()), float(found.correct.sum()), int(found.tokens.sum()))

    @contextmanager
    def moved(self, micro: MicroBatch, weights: Tensor) -> Iterator[RowLoss]:
        """The rows' loss at moved hidden states, plain with rho 0 or between every n-th step. Raises NonFiniteLoss.

        Go backward while it is open: a checkpointed layer that is recomputed needs the same perturbation.
        """
        if self._rho == 0 or micro.step % self._every:
            yield self._losses(micro.rows)
            return
        state = rng_state()
        found = self.perturb(micro.rows, weights)
        if not torch.isfinite(found.norm).all():
            raise NonFiniteLoss(micro.step, micro.indices)
        set_rng_state(state)
        with edited_outputs(self._blocks, lambda i, output: output + found.eps[i]):
            yield self._losses(micro.rows)

    def perturb(self, rows: Sequence[EncodedRow], weights: Tensor) -> Perturbation:
        """eps_l = rho g_l / ||g||, one norm over all layers (and rows, unless per row); no .grad is touched.

        Per row, ||eps of row b|| = rho: independent of batch size, padding and accumulation.
        """
        longest = max(len(row.ids) for row in rows)
        shape = (len(rows), longest, self._base.hidden_size)
        dtype = next(self._base.model.parameters()).dtype
        leaves = [torch.zeros(shape, device=self._base.device, dtype=dtype, requires_grad=True) for _ in self._blocks]
        with torch.enable_grad(), edited_outputs(self._blocks, lambda i, output: output + leaves[i]):
            nll = self._losses(rows).nll
            loss = (weights.to(nll) * nll).sum()
            grads = list(torch.autograd.grad(loss, leaves))
        squares = torch.stack([at_least_fp32(g).square().sum(dim=(1, 2)) for g in grads]).sum(0)  # (B,)
        norm = squares.sqrt() if self._norm == "per_row" else squares.sum().sqrt().expand(len(rows))
        scale = torch.where(norm > 0, self._rho / norm.clamp(min=torch.finfo(torch.float32).tiny), norm)
        eps = [(scale[:, None, None] * at_least_fp32(g)).to(g.dtype) for g in grads]
        return Perturbation(eps, grads, norm, float(loss.detach()))

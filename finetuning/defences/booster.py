"""Booster: align against the drop of the harmful loss that one normalised harmful step would bring.

Source: arXiv:2409.01586; methods.md 5. delta = g_A + xi (g_H - g_H'), g_H' at theta - rho g_H / ||g_H||; 3(F+B).
Deviations: weights are restored by copy (adding the step back drifts), random state is replayed, gradients are added
and never zeroed. Written apart from antibody_align.py on purpose: invariant M19 compares the two.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from finetuning.contract.recipe import AntibodyAlignSettings
from finetuning.model.base import FrozenBase
from finetuning.model.losses import RowLosses, row_nll
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.batches import pick
from finetuning.training.determinism import rng_state, set_rng_state
from finetuning.training.strategies import Backward, MicroBatch, StepLoss


class Booster:
    """delta = g_A + xi (g_H - g_H'); of the settings only `rho` and `xi` are read. `losses`
    stand in place of the alignment rows' nll."""

    def __init__(
        self,
        base: FrozenBase,
        cache: PrefixCache,
        settings: AntibodyAlignSettings,
        *,
        parameters: Sequence[nn.Parameter],
        harmful: Sequence[EncodedRow],
        seed: int,
        losses: RowLosses | None = None,
    ) -> None:
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters):
            raise TypeError("Booster needs fp32 adapters: half precision rounds the simulated step away")
        self._base = base
        self._cache = cache
        self._losses = losses or partial(row_nll, base, cache)
        self._settings = settings
        self._parameters = list(parameters)
        self._harmful = harmful
        self._seed = seed

    def gradients(self, micro: MicroBatch, weights: Tensor, backward: Backward) -> StepLoss:
        """Add delta, scaled by the micro-batch's share of the step; the reported loss is the alignment rows' alone."""
        stream = f"harmful:{micro.start}"  # every slice of a step draws its own rows
        chosen = pick(len(self._harmful), len(micro.rows), seed=self._seed, step=micro.step, stream=stream)
        g_h, g_moved = self._two_slopes([self._harmful[i] for i in chosen])
        found = self._losses(micro.rows)
        loss = (weights.to(found.nll) * found.nll).sum()
        backward(loss)
        scale = float(weights.sum()) * self._settings.xi
        for parameter, here, there in zip(self._parameters, g_h, g_moved, strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(here - there, alpha=scale)
        return StepLoss(float(loss.detach()), float(found.correct.sum()), int(found.tokens.sum()))

    def _two_slopes(self, rows: Sequence[EncodedRow]) -> tuple[list[Tensor], list[Tensor]]:
        """g_H here and one normalised step down the harmful loss; theta is back bitwise when it returns."""
        state = rng_state()
        here = self._slope(rows)
        length = torch.stack([g.double().square().sum() for g in here]).sum().sqrt()
        kept = [p.detach().clone() for p in self._parameters]
        with torch.no_grad():
            for parameter, g in zip(self._parameters, here, strict=True):
                parameter.sub_(self._settings.rho * g / length.clamp(min=1e-12).to(g))
        try:
            set_rng_state(state)
            return here, self._slope(rows)
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, kept, strict=True):
                    parameter.copy_(value)

    def _slope(self, rows: Sequence[EncodedRow]) -> list[Tensor]:
        """Gradient of the mean row loss; no .grad is touched."""
        return list(torch.autograd.grad(row_nll(self._base, self._cache, rows).nll.mean(), self._parameters))

"""Antibody's alignment step: keep the loss on harmful rows flat, so that later fine-tuning finds no slope.

Source: arXiv:2603.00498, Theorem 4.1; methods.md 2.2. Deviations: lambda is clipped at lambda_max, weights are restored
by copy (bitwise), random state is replayed, gradients are added and never zeroed. Must not know the loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetuning.base_model import BaseModel
from finetuning.batches import pick
from finetuning.chat_format import EncodedRow
from finetuning.determinism import rng_state, set_rng_state
from finetuning.objectives import row_nll
from finetuning.prefix_cache import PrefixCache
from finetuning.spec.recipe import AntibodyAlign as Settings
from finetuning.strategies import Backward, MicroBatch, StepLoss

Grads = list[Tensor]


@dataclass(frozen=True)
class Sharpness:
    """g_S = grad L_harm(theta) - grad L_harm(theta_p), and the refusal gradient at the perturbed weights."""

    g_s: Grads
    g_refusal: Grads


class AntibodyAlign:
    """delta = g_A + lambda g_S + lambda_r g_refusal(theta_p)."""

    def __init__(
        self,
        base: BaseModel,
        cache: PrefixCache,
        settings: Settings,
        *,
        parameters: Sequence[nn.Parameter],
        harmful: Sequence[EncodedRow],
        refused: Sequence[EncodedRow],
        seed: int,
    ) -> None:
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters):
            raise TypeError("the alignment step needs fp32 adapters: half precision rounds the perturbation away")
        self._base = base
        self._cache = cache
        self._settings = settings
        self._parameters = list(parameters)
        self._harmful = harmful
        self._refused = refused
        self._seed = seed

    def gradients(
        self,
        micro: MicroBatch,
        weights: Tensor,
        backward: Backward,  # noqa: ARG002 - the slot's signature; this step reads gradients itself
    ) -> StepLoss:
        """Add delta, scaled by the micro-batch's share of the step, to the adapter's gradients."""
        stream = f"harmful:{micro.start}"  # every slice of a step draws its own rows
        chosen = pick(len(self._harmful), len(micro.rows), seed=self._seed, step=micro.step, stream=stream)
        sharp = self.sharpness([self._harmful[i] for i in chosen], [self._refused[i] for i in chosen])
        found = row_nll(self._base, self._cache, micro.rows)
        share = float(weights.sum())
        loss = (weights.to(found.nll) * found.nll).sum()
        g_a = self._grads(loss)
        # The rule compares mean gradients; g_a holds this slice's share of the step's mean already.
        scale = strength(self._settings, [g / share for g in g_a], sharp.g_s) if share > 0 else 0.0
        for i, parameter in enumerate(self._parameters):
            delta = g_a[i]
            if scale:
                delta = delta + share * scale * sharp.g_s[i]
            if self._settings.lambda_refusal:
                delta = delta + share * self._settings.lambda_refusal * sharp.g_refusal[i]
            parameter.grad = delta.clone() if parameter.grad is None else parameter.grad + delta
        return StepLoss(float(loss.detach()), float(found.correct.sum()), int(found.tokens.sum()))

    def sharpness(self, harmful: Sequence[EncodedRow], refused: Sequence[EncodedRow]) -> Sharpness:
        """g_S with the direction held fixed; the weights are back bitwise when it returns."""
        state = rng_state()
        g_h = self._grads(row_nll(self._base, self._cache, harmful).nll.mean())
        kept = [p.detach().clone() for p in self._parameters]
        self.perturb(g_h)
        try:
            set_rng_state(state)
            g_moved = self._grads(row_nll(self._base, self._cache, harmful).nll.mean())
            g_refusal = self._grads(row_nll(self._base, self._cache, refused).nll.mean())
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, kept, strict=True):
                    parameter.copy_(value)
        return Sharpness([a - b for a, b in zip(g_h, g_moved, strict=True)], g_refusal)

    @torch.no_grad()
    def perturb(self, g_h: Grads) -> None:
        """theta_p = theta - rho g_H / ||g_H||, one norm over all parameters together."""
        norm = _dot(g_h, g_h).sqrt()
        if float(norm) <= 1e-12:
            return
        for parameter, gradient in zip(self._parameters, g_h, strict=True):
            parameter.sub_((self._settings.rho / norm).to(parameter) * gradient)

    def _grads(self, loss: Tensor) -> Grads:
        return list(torch.autograd.grad(loss, self._parameters))


def strength(settings: Settings, g_a: Grads, g_s: Grads) -> float:
    """lambda of the rule: `theorem` max(0, xi - <g_A,g_S>/||g_S||^2), `released` xi - cos, `constant` xi; clipped."""
    squared = float(_dot(g_s, g_s))
    if squared < 1e-20:
        return 0.0
    inner = float(_dot(g_a, g_s))
    if settings.rule == "constant":
        raw = settings.xi
    elif settings.rule == "released":
        raw = settings.xi - inner / (squared**0.5 * max(float(_dot(g_a, g_a)) ** 0.5, 1e-12))
    else:
        raw = settings.xi - inner / squared
    return min(max(raw, 0.0), settings.lambda_max)


def _dot(first: Grads, second: Grads) -> Tensor:
    return torch.stack([(a.double() * b.double()).sum() for a, b in zip(first, second, strict=True)]).sum()

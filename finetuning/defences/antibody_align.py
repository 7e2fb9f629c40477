"""Antibody's alignment step: keep the loss on harmful rows flat, so that later fine-tuning finds no slope.

Source: arXiv:2603.00498, Theorem 4.1; methods.md 2.2. Deviations: lambda is clipped at lambda_max, weights are restored
by copy (bitwise), random state is replayed, gradients are added and never zeroed. With a Vaccine the alignment gradient
is taken under its perturbation (ours, methods.md 8.8).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetuning.contract.recipe import AntibodyAlignSettings
from finetuning.defences.vaccine import Vaccine
from finetuning.model.base import FrozenBase
from finetuning.model.losses import RowLoss, row_nll
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.batches import pick
from finetuning.training.determinism import rng_state, set_rng_state
from finetuning.training.strategies import Backward, MicroBatch, StepLoss

Grads = list[Tensor]


@dataclass(frozen=True)
class Sharpness:
    """g_S = grad L_harm(theta) - grad L_harm(theta_p), and the refusal gradient at the perturbed weights."""

    g_s: Grads
    g_refusal: Grads


class AntibodyAlign:
    """delta = g_A + lambda g_S + lambda_r g_refusal(theta_p), g_A at Vaccine's hidden states if one is given.

    Remembers the moving average of lambda that the `released` rule keeps, one observation for each micro-batch.
    """

    def __init__(
        self,
        base: FrozenBase,
        cache: PrefixCache,
        settings: AntibodyAlignSettings,
        *,
        parameters: Sequence[nn.Parameter],
        harmful: Sequence[EncodedRow],
        refused: Sequence[EncodedRow],
        seed: int,
        vaccine: Vaccine | None = None,
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
        self._vaccine = vaccine
        self._lambda: float | None = None

    def state(self) -> dict[str, Tensor]:
        """The average so far, or nothing before the first step and for the other rules."""
        return {} if self._lambda is None else {"lambda": torch.tensor([self._lambda], dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        self._lambda = float(state["lambda"]) if "lambda" in state else None

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
        with self._aligned_loss(micro, weights) as found:
            loss = (weights.to(found.nll) * found.nll).sum()
            g_a = self._grads(loss)
        share = float(weights.sum())
        # The rule compares mean gradients; g_a holds this slice's share of the step's mean already.
        scale = self._strength([g / share for g in g_a], sharp.g_s) if share > 0 else 0.0
        for i, parameter in enumerate(self._parameters):
            delta = g_a[i]
            if scale:
                delta = delta + share * scale * sharp.g_s[i]
            if self._settings.lambda_refusal:
                delta = delta + share * self._settings.lambda_refusal * sharp.g_refusal[i]
            parameter.grad = delta.clone() if parameter.grad is None else parameter.grad + delta
        return StepLoss(float(loss.detach()), float(found.correct.sum()), int(found.tokens.sum()))

    def _aligned_loss(self, micro: MicroBatch, weights: Tensor) -> AbstractContextManager[RowLoss]:
        if self._vaccine is not None:
            return self._vaccine.moved(micro, weights)
        return nullcontext(row_nll(self._base, self._cache, micro.rows))

    def _strength(self, g_a: Grads, g_s: Grads) -> float:
        """lambda of this micro-batch; a flat spot has none to remember."""
        raw = strength(self._settings, g_a, g_s)
        if self._settings.rule != "released" or _is_flat(g_s):
            return raw
        self._lambda = averaged(self._lambda, raw, self._settings.ema)
        return self._lambda

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


def strength(settings: AntibodyAlignSettings, g_a: Grads, g_s: Grads) -> float:
    """lambda of the rule: `theorem` max(0, xi - <g_A,g_S>/||g_S||^2), `released` xi - cos, `constant` xi; clipped."""
    if _is_flat(g_s):
        return 0.0
    squared = float(_dot(g_s, g_s))
    inner = float(_dot(g_a, g_s))
    if settings.rule == "constant":
        raw = settings.xi
    elif settings.rule == "released":
        raw = settings.xi - inner / (squared**0.5 * max(float(_dot(g_a, g_a)) ** 0.5, 1e-12))
    else:
        raw = settings.xi - inner / squared
    return min(max(raw, 0.0), settings.lambda_max)


def averaged(last: float | None, raw: float, keep: float) -> float:
    """keep * last + (1 - keep) * raw; the first value stands for itself, so that the average never starts at 0."""
    return raw if last is None else keep * last + (1 - keep) * raw


def _is_flat(g_s: Grads) -> bool:
    return float(_dot(g_s, g_s)) < 1e-20


def _dot(first: Grads, second: Grads) -> Tensor:
    return torch.stack([(a.double() * b.double()).sum() for a, b in zip(first, second, strict=True)]).sum()

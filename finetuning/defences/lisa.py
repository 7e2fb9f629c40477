"""Lisa: take turns between the operator's refusals and the user's rows, and hold each turn near the other's end.

Source: arXiv:2405.18641, methods.md 5; an anchor is the last iterate of the other state, as in the paper's trainer.
Deviations: turns are counted in optimiser steps, refusals are picked by (seed, step), the loss is the mean of rows.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from finetuning.contract.recipe import LisaSettings
from finetuning.model.base import FrozenBase
from finetuning.model.losses import row_nll
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.batches import pick
from finetuning.training.strategies import Backward, MicroBatch, StepLoss

Turn = Literal["align", "user"]


class Lisa:
    """loss = nll of the turn's rows + (rho / 2) ||theta - anchor||^2, theta being the trained adapter's factors."""

    def __init__(
        self,
        base: FrozenBase,
        cache: PrefixCache,
        settings: LisaSettings,
        *,
        parameters: Sequence[nn.Parameter],
        aligned: Sequence[EncodedRow],
        steps: int,
        seed: int,
    ) -> None:
        if not aligned:
            raise ValueError("Lisa needs the operator's refusals: none were given")
        self._base = base
        self._cache = cache
        self._settings = settings
        self._parameters = list(parameters)
        self._aligned = aligned
        self._first_held = math.ceil(settings.free_share * steps - 1e-9)
        self._seed = seed
        self._ends: dict[Turn, list[Tensor]] = {"align": self._theta(), "user": self._theta()}

    def gradients(self, micro: MicroBatch, weights: Tensor, backward: Backward) -> StepLoss:
        """Add the micro-batch's gradient; weights (rows,) count in the user's turn only, refusals weigh alike.

        The first slice of a step also carries the proximal term.
        """
        turn = turn_of(self._settings, micro.step)
        if micro.start == 0:
            self._remember(micro.step)
        rows = micro.rows
        if turn == "align":
            refusals = self.refusals(micro.step, micro.step_rows)
            rows = refusals[micro.start : micro.start + len(micro.rows)]
            weights = weights.new_full((len(rows),), 1.0 / len(refusals))
        loss, correct, tokens = weights.new_zeros((), device=self._base.device), 0.0, 0
        if rows:
            found = row_nll(self._base, self._cache, rows)
            loss = (weights.to(found.nll) * found.nll).sum()
            correct, tokens = float(found.correct.sum()), int(found.tokens.sum())
        if micro.start == 0 and self._settings.rho and micro.step >= self._first_held:
            loss = loss + self.proximal(turn)
        if loss.requires_grad:
            backward(loss)
        return StepLoss(float(loss.detach()), correct, tokens)

    def refusals(self, step: int, count: int) -> list[EncodedRow]:
        """The operator rows of an alignment step: `count` of them (fewer if there are fewer), pure in (seed, step)."""
        chosen = pick(len(self._aligned), count, seed=self._seed, step=step, stream="lisa")
        return [self._aligned[i] for i in chosen]

    def proximal(self, turn: Turn) -> Tensor:
        """(rho / 2) ||theta - last iterate of the other turn||^2, one sum over all parameters."""
        anchor = self._ends["user" if turn == "align" else "align"]
        apart = [(p - a).square().sum() for p, a in zip(self._parameters, anchor, strict=True)]
        return self._settings.rho / 2 * torch.stack(apart).sum()

    def state(self) -> dict[str, Tensor]:
        """Both anchors as CPU tensors; the turn itself is a function of the step."""
        return {f"{turn}.{i}": t.cpu() for turn, end in self._ends.items() for i, t in enumerate(end)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the anchors back. Raises KeyError when one is missing."""
        for turn in self._ends:
            self._ends[turn] = [state[f"{turn}.{i}"].to(p) for i, p in enumerate(self._parameters)]

    def _remember(self, step: int) -> None:
        """Where a turn begins, the parameters still are the last iterate of the turn before."""
        if step and turn_of(self._settings, step) != turn_of(self._settings, step - 1):
            self._ends[turn_of(self._settings, step - 1)] = self._theta()

    def _theta(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._parameters]


def turn_of(settings: LisaSettings, step: int) -> Turn:
    """Whose turn a 0-based optimiser step is; every period begins with the operator's refusals."""
    return "align" if step % (settings.align_steps + settings.user_steps) < settings.align_steps else "user"

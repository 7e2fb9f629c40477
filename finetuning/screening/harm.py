"""How likely a text asks for harm: two readings of the aligned model in one calibrated probability. Ours, no paper's.

One reading is the refusal mass (job/readings.py), which a text can only have by itself: other sentences around a
request dilute it, and a fragment that is no request at all ("Just call Alex.") may have it too. The other is a linear
probe of the state at a sentence's last token, which reads a sentence in its surroundings or alone, and knows fragments.
Both are weighed by a logistic regression on the operator's calibration rows (methods.md 8.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Of benign calibration texts this share may lie above the limit, if half of the harmful ones still do.
_FALSE_ALARMS, _LEAST_CAUGHT = 0.02, 0.5
# Off the diagonal, the pooled covariance counts a tenth: some hundred rows do not know it better (ADR 0019).
_SHRINK = 0.9
_LEAST_MASS = 1e-6
_RIDGE = 3e-4  # of the logistic regression, on standardised readings
_STEPS = 50


@dataclass(frozen=True)
class HarmModel:
    """Direction (D,) and offset of the probe; offset and factors of the log-odds; `suspicious`: the probe's value from
    which a sentence of a longer prompt is read alone."""

    direction: tuple[float, ...]
    offset: float
    odds: tuple[float, float, float]
    suspicious: float

    def probe(self, states: Tensor) -> Tensor:
        """The probe's value (n,) of states (n, D); about 0 between the classes, in standard deviations of one class."""
        return states.double() @ torch.tensor(self.direction, dtype=torch.float64) - self.offset

    def probability(self, probe: Tensor, mass: Tensor, threshold: float) -> Tensor:
        """P(harm) (n,) of texts by their probe values and refusal masses; the mass counts against the threshold of the
        model that it was read with, so that a scout's readings can be judged as well."""
        base, by_probe, by_mass = self.odds
        return torch.sigmoid(base + by_probe * probe.double() + by_mass * margin(mass, threshold)).float()


def margin(mass: Tensor, threshold: float) -> Tensor:
    """Log-odds of a refusal mass above those of the threshold."""
    odds = torch.logit(mass.double().clamp(_LEAST_MASS, 1 - _LEAST_MASS))
    return odds - torch.logit(torch.tensor(threshold, dtype=torch.float64).clamp(_LEAST_MASS, 1 - _LEAST_MASS))


@dataclass(frozen=True)
class Direction:
    """A fitted probe: its direction (D,) and offset."""

    direction: Tensor
    offset: float

    def of(self, states: Tensor) -> Tensor:
        """Values (n,) of states (n, D)."""
        return states.double() @ self.direction - self.offset


def fit_direction(harmful: Tensor, benign: Tensor) -> Direction:
    """Linear discriminant of states (n, D) of sentences that ask for harm and of others, by a shrunk pooled covariance.

    In units of its own standard deviation within a class, 0 half-way between the means.
    """
    first, second = harmful.double(), benign.double()
    up, down = first.mean(0), second.mean(0)
    within = torch.cat([first - up, second - down])
    pooled = within.T @ within / len(within)
    diagonal = pooled.diagonal().clamp(min=1e-12)
    shrunk = (1 - _SHRINK) * pooled + _SHRINK * torch.diag(diagonal)
    found = torch.linalg.solve(shrunk + 1e-4 * diagonal.mean() * torch.eye(len(diagonal)), up - down)
    scale = (within @ found).square().mean().sqrt().clamp(min=1e-12)
    return Direction(found / scale, float((up + down) @ found / (2 * scale)))


def fit_odds(harmful: Sequence[Tensor], benign: Sequence[Tensor]) -> tuple[float, float, float]:
    """Logistic regression on (probe values, mass margins) of either class, which count alike, moved so that P(harm) .5
    lies where two of a hundred benign texts are above it, and at least where both classes are as likely.

    Factors below 0 are held at 0: more of either reading is never a sign of less harm.
    """
    x = torch.cat([torch.stack(list(pair), dim=1) for pair in (harmful, benign)]).double()
    y = torch.cat([torch.ones(len(harmful[0])), torch.zeros(len(benign[0]))]).double()
    each = torch.where(y > 0, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-9)
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Any:
        solver.zero_grad()
        z = w[0] + ((x - mean) / spread) @ w[1:].clamp(min=0)
        value = (each * F.binary_cross_entropy_with_logits(z, y, reduction="none")).sum() + _RIDGE * w[
            1:
        ].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    factors = w.detach()[1:].clamp(min=0) / spread
    base = w.detach()[0] - (factors * mean).sum()
    found = base + x @ factors
    alarms, caught = found[y == 0].quantile(1 - _FALSE_ALARMS), found[y > 0].quantile(1 - _LEAST_CAUGHT)
    base = base - torch.minimum(alarms, caught).clamp(min=0)
    return float(base), float(factors[0]), float(factors[1])

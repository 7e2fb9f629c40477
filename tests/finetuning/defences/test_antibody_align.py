"""Facts about Antibody's alignment step: methods.md 2.2, M10 and M13 to M22. Under Vaccine: test_joint.py."""

import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from finetuning.contract.recipe import AntibodyAlignSettings, LoraSettings, OptimiserSettings
from finetuning.defences.antibody_align import AntibodyAlign, averaged, strength
from finetuning.defences.plain import Even, Plain
from finetuning.defences.vaccine import Vaccine
from finetuning.model import lora
from finetuning.model.base import FrozenBase
from finetuning.model.losses import row_nll
from finetuning.rows.chat_format import EncodedRow
from finetuning.training import checkpoint
from finetuning.training.batches import Stream
from finetuning.training.loop import train
from finetuning.training.state import LoopState, TrainSetup
from finetuning.training.strategies import GradientStep, MicroBatch, Remembers
from tests.support.models import (
    adapted_base,
    blank,
    even,
    farthest,
    gradient_of,
    gradients,
    norm,
    random_rows,
    uncached,
    vaccine_on,
)

HARMFUL, REFUSED, ALIGNED = random_rows(4, seed=1), random_rows(4, seed=2), random_rows(4, seed=3)


def step_on(base: FrozenBase, vaccine: Vaccine | None = None, **settings: object) -> AntibodyAlign:
    return AntibodyAlign(
        base,
        uncached(base),
        AntibodyAlignSettings.model_validate(settings),
        parameters=lora.parameters(base, lora.TASK),
        harmful=HARMFUL,
        refused=REFUSED,
        seed=5,
        vaccine=vaccine,
    )


def delta_of(
    base: FrozenBase, step: GradientStep, rows: Sequence[EncodedRow] = ALIGNED, *, number: int = 0
) -> list[torch.Tensor]:
    return gradient_of(base, step, rows, number=number)


def harm(base: FrozenBase) -> torch.Tensor:
    return row_nll(base, uncached(base), HARMFUL).nll.mean()


def harm_value(base: FrozenBase) -> float:
    with torch.no_grad():
        return float(harm(base))


def smooth_base() -> FrozenBase:
    """A family that computes in float64 throughout (others normalise in fp32), for finite differences."""
    return adapted_base("opt")


def slope(base: FrozenBase) -> list[torch.Tensor]:
    return list(torch.autograd.grad(harm(base), lora.parameters(base, lora.TASK)))


def sharpness_of(base: FrozenBase) -> list[torch.Tensor]:
    """g_S of the settings' default length, by the step's own function (M14 checks that one)."""
    return step_on(base).sharpness(HARMFUL, REFUSED).g_s


def dot(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return float(sum((a * b).sum() for a, b in zip(first, second, strict=True)))


@torch.no_grad()
def move(base: FrozenBase, direction: list[torch.Tensor], length: float) -> None:
    for parameter, value in zip(lora.parameters(base, lora.TASK), direction, strict=True):
        parameter.add_(length * value)


def weights_of(base: FrozenBase) -> list[torch.Tensor]:
    return [p.detach().clone() for p in lora.parameters(base, lora.TASK)]


def random_vectors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, generator=generator, dtype=torch.float64), torch.randn(5, generator=generator).double()]


def test_the_simulated_attack_has_the_given_length() -> None:
    """M13: ||theta_p - theta|| = rho."""
    base = adapted_base()
    before = weights_of(base)
    step_on(base, rho=0.1).perturb(slope(base))
    assert norm([a - b for a, b in zip(weights_of(base), before, strict=True)]) == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1e-9])
def test_a_small_slope_is_followed_as_far_as_a_large_one(size: float) -> None:
    """M13: the direction counts, not the size; a model that is nearly aligned has small harmful slopes."""
    base = adapted_base()
    before, direction = weights_of(base), slope(base)
    step_on(base, rho=0.1).perturb([g / norm(direction) * size for g in direction])
    assert norm([a - b for a, b in zip(weights_of(base), before, strict=True)]) == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weights_are_restored_bitwise(dtype: torch.dtype) -> None:
    """M13: theta after the step is theta before it, to the bit."""
    base = adapted_base(dtype=dtype)
    before = weights_of(base)
    delta_of(base, step_on(base))
    assert all(torch.equal(a, b) for a, b in zip(weights_of(base), before, strict=True))


def test_the_sharpness_gradient_matches_a_finite_difference() -> None:
    """M14: d/dt [L_harm(theta + tv) - L_harm(theta + tv - rho g)] at fixed g equals <g_S, v> for 5 random v."""
    base = smooth_base()
    g_s = step_on(base, rho=0.1).sharpness(HARMFUL, REFUSED).g_s
    g_h = slope(base)
    attack = [-0.1 * g / norm(g_h) for g in g_h]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        v = [torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in g_h]
        values: list[float] = []
        for t in (1e-4, -1e-4):
            move(base, v, t)
            here = harm_value(base)
            move(base, attack, 1.0)
            values.append(here - harm_value(base))
            move(base, attack, -1.0)
            move(base, v, -t)
        assert (values[0] - values[1]) / 2e-4 == pytest.approx(dot(g_s, v), rel=1e-4, abs=1e-8)


def test_the_loss_falls_along_the_simulated_attack() -> None:
    """M15: L_harm(theta) - L_harm(theta_p) -> rho ||g_H|| as rho -> 0."""
    base = smooth_base()
    gaps: list[float] = []
    for rho in (1e-2, 1e-3, 1e-5):
        before, g_h, start = harm_value(base), slope(base), weights_of(base)
        step_on(base, rho=rho).perturb(g_h)
        fall = before - harm_value(base)
        with torch.no_grad():
            for parameter, value in zip(lora.parameters(base, lora.TASK), start, strict=True):
                parameter.copy_(value)
        assert fall > 0
        gaps.append(abs(fall / (rho * norm(g_h)) - 1))
    assert gaps[2] < 1e-3
    assert gaps[2] < gaps[1] < gaps[0]


@pytest.mark.parametrize("seed", range(8))
def test_the_step_meets_its_target(seed: int) -> None:
    """M16: <g_S, delta> >= a_t = xi ||g_S||^2, with equality when lambda > 0."""
    g_a, g_s = random_vectors(seed), random_vectors(seed + 100)
    xi = 0.3 if seed % 2 else -0.5
    lam = strength(AntibodyAlignSettings(xi=xi, lambda_max=1e9), g_a, g_s)
    delta = [a + lam * s for a, s in zip(g_a, g_s, strict=True)]
    target = xi * dot(g_s, g_s)
    assert dot(g_s, delta) >= target - 1e-9
    if lam > 0:
        assert dot(g_s, delta) == pytest.approx(target, abs=1e-9)


def test_no_sharpness_is_added_where_the_target_is_met() -> None:
    """M17: lambda is 0 exactly when <g_A, g_S> >= a_t, and then delta is g_A bitwise."""
    for seed in range(20):
        g_a, g_s = random_vectors(seed), random_vectors(seed + 100)
        bound = dot(g_a, g_s) / dot(g_s, g_s)
        assert strength(AntibodyAlignSettings(xi=bound - 1e-6), g_a, g_s) == 0
        assert strength(AntibodyAlignSettings(xi=bound + 1e-6), g_a, g_s) > 0
    base = adapted_base()
    plain = delta_of(base, Plain(base, uncached(base)))
    defended = delta_of(base, step_on(base, xi=-1e6, lambda_refusal=0.0))
    assert all(torch.equal(a, b) for a, b in zip(plain, defended, strict=True))


def test_the_step_is_the_nearest_feasible_point() -> None:
    """M18: no random feasible delta lies closer to g_A."""
    g_a, g_s = random_vectors(1), random_vectors(2)
    settings = AntibodyAlignSettings(xi=0.4, lambda_max=1e9)
    ours = strength(settings, g_a, g_s) * norm(g_s)
    target, tried, rng = 0.4 * dot(g_s, g_s), 0, random.Random(0)
    while tried < 100:
        other = [a + rng.uniform(0.1, 3) * o for a, o in zip(g_a, random_vectors(rng.randrange(10**6)), strict=True)]
        short = max(0.0, target - dot(g_s, other)) / dot(g_s, g_s)
        other = [o + short * s for o, s in zip(other, g_s, strict=True)]
        assert dot(g_s, other) >= target - 1e-9
        assert norm([o - a for o, a in zip(other, g_a, strict=True)]) >= ours - 1e-12
        tried += 1


def test_a_constant_strength_without_refusals_is_booster() -> None:
    """M19: g_A + lambda (g_H - g_H at theta_p), computed apart, agrees to 1e-9."""
    base = adapted_base()
    ours = delta_of(base, step_on(base, rule="constant", xi=5.0, lambda_refusal=0.0))
    g_a, g_h = delta_of(base, Plain(base, uncached(base))), slope(base)
    attack = [g / norm(g_h) for g in g_h]
    move(base, attack, -0.1)
    g_moved = slope(base)
    booster = [a + 5.0 * (h - m) for a, h, m in zip(g_a, g_h, g_moved, strict=True)]
    assert farthest(ours, booster) < 1e-9


def test_the_refusal_term_is_taken_at_the_moved_weights() -> None:
    """M19: with lambda 0 only lambda_r times the refusals' gradient at theta_p is added."""
    base = adapted_base()
    ours = delta_of(base, step_on(base, xi=-1e6, lambda_refusal=0.05))
    g_a, g_h = delta_of(base, Plain(base, uncached(base))), slope(base)
    move(base, [g / norm(g_h) for g in g_h], -0.1)
    refusal = row_nll(base, uncached(base), REFUSED).nll.mean()
    g_r = torch.autograd.grad(refusal, lora.parameters(base, lora.TASK))
    assert farthest(ours, [a + 0.05 * r for a, r in zip(g_a, g_r, strict=True)]) < 1e-9


def test_the_released_rule_stays_around_its_margin() -> None:
    """M20: xi 5 gives a lambda in [4, 6], and exactly xi - cos."""
    for seed in range(20):
        g_a, g_s = random_vectors(seed), random_vectors(seed + 100)
        lam = strength(AntibodyAlignSettings(rule="released", xi=5.0), g_a, g_s)
        assert 4 <= lam <= 6
        assert lam == pytest.approx(5.0 - dot(g_a, g_s) / (norm(g_a) * norm(g_s)), rel=1e-9)
        small = [g * 1e-6 for g in g_a]
        assert strength(AntibodyAlignSettings(rule="released", xi=5.0), small, g_s) == pytest.approx(
            lam, rel=1e-9
        )  # a cosine


def test_an_average_that_keeps_nothing_is_the_raw_value() -> None:
    """M20: EMA 0 returns the raw value, step after step; another share mixes, and the first value stands alone."""
    base = adapted_base()
    step = step_on(base, rule="released", xi=5.0, ema=0.0)
    other = step_on(base, rule="released", xi=5.0, ema=0.75)
    raw: list[float] = []
    for number in range(3):
        for each in (step, other):
            delta_of(base, each, random_rows(4, seed=20 + number), number=number)
        raw.append(float(step.state()["lambda"]))
        g_a = delta_of(base, Plain(base, uncached(base)), random_rows(4, seed=20 + number))
        assert raw[-1] == pytest.approx(
            strength(AntibodyAlignSettings(rule="released"), g_a, sharpness_of(base)), rel=1e-9
        )
    mixed = 0.75 * (0.75 * raw[0] + 0.25 * raw[1]) + 0.25 * raw[2]
    assert float(other.state()["lambda"]) == pytest.approx(mixed, rel=1e-12)
    assert len(set(raw)) == 3
    assert (averaged(None, 5.0, 0.9), averaged(4.0, 5.0, 0.9), averaged(4.0, 5.0, 0.0)) == (5.0, 4.1, 5.0)


def test_the_step_is_taken_with_the_average() -> None:
    """M20: g_A + average * g_S, in [4, 6] from the first step on."""
    base = adapted_base()
    step = step_on(base, rule="released", xi=5.0, ema=0.5, lambda_refusal=0.0)
    step.load_state({"lambda": torch.tensor([4.25], dtype=torch.float64)})
    delta, g_a, g_s = delta_of(base, step), delta_of(base, Plain(base, uncached(base))), sharpness_of(base)
    lam = (4.25 + strength(AntibodyAlignSettings(rule="released"), g_a, g_s)) / 2
    assert 4 <= lam <= 6
    assert farthest(delta, [a + lam * s for a, s in zip(g_a, g_s, strict=True)]) < 1e-9


@pytest.mark.parametrize("rule", ["theorem", "constant"])
def test_other_rules_remember_nothing(rule: str) -> None:
    base = adapted_base()
    step = step_on(base, rule=rule)
    delta_of(base, step)
    assert step.state() == {}


def test_a_flat_spot_is_not_remembered() -> None:
    """M21: without sharpness there is no strength to average in."""
    base = adapted_base()
    step = step_on(base, rule="released", rho=0.0)
    delta_of(base, step)
    assert step.state() == {}
    step.load_state({"lambda": torch.tensor([4.5], dtype=torch.float64)})
    delta_of(base, step)
    assert float(step.state()["lambda"]) == 4.5
    step.load_state({})
    assert step.state() == {}


def released_setup(folder: Path) -> TrainSetup:
    """Vaccine on every second step, an average of lambda, dropout and two slices a step."""
    base = adapted_base(shape=LoraSettings(rank=4, alpha=8.0, dropout=0.1), dtype=torch.float32)
    return TrainSetup(
        rows=random_rows(9), batches=Stream(9, 4, 5), weigher=Even(), seed=7, steps=4, micro_batch_size=2,
        step=step_on(base, vaccine_on(base, every=2), rule="released", ema=0.5), fingerprint="same", folder=folder,
        parameters=lora.parameters(base, lora.TASK), optimiser=OptimiserSettings(learning_rate=1e-2),
        dropouts=lora.dropouts(base, lora.TASK), save_every=0,
    )  # fmt: skip


def test_a_resumed_run_remembers_the_average(tmp_path: Path) -> None:
    """M45: stopped after 2 of 4 steps and resumed elsewhere, the adapter and the average are the same to the bit."""
    whole = released_setup(tmp_path)
    state = LoopState()
    loop = train(whole, state)
    next(loop), next(loop)
    checkpoint.save(whole, state, 0.0, 0.0)
    list(loop)
    resumed = released_setup(tmp_path)
    list(train(resumed, checkpoint.restore(resumed, tmp_path / "2")[0]))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, resumed.parameters, strict=True))
    assert isinstance(whole.step, Remembers)
    assert isinstance(resumed.step, Remembers)
    assert torch.equal(whole.step.state()["lambda"], resumed.step.state()["lambda"])


def test_the_strength_is_clipped() -> None:
    g_a, g_s = random_vectors(1), [1e-6 * g for g in random_vectors(2)]
    lams = [strength(AntibodyAlignSettings(lambda_max=10.0), [sign * g for g in g_a], g_s) for sign in (1.0, -1.0)]
    assert sorted(lams) == [0.0, 10.0]


def test_no_attack_means_no_sharpness() -> None:
    """M21: rho 0 gives g_S 0, lambda 0 and no division by zero."""
    base = adapted_base()
    step = step_on(base, rho=0.0, lambda_refusal=0.0)
    g_s = step.sharpness(HARMFUL, REFUSED).g_s
    assert norm(g_s) == 0
    assert strength(AntibodyAlignSettings(), g_s, g_s) == 0
    plain = delta_of(base, Plain(base, uncached(base)))
    assert all(torch.equal(a, b) for a, b in zip(delta_of(base, step), plain, strict=True))


def test_a_harmful_loss_without_slope_moves_nothing() -> None:
    """M21: a zero g_H leaves theta where it is."""
    base = adapted_base()
    before = weights_of(base)
    step_on(base).perturb([torch.zeros_like(p) for p in before])
    assert all(torch.equal(a, b) for a, b in zip(weights_of(base), before, strict=True))


def test_a_micro_batch_without_targets_adds_nothing() -> None:
    """M11: a slice that weighs nothing has no strength, no NaN, and is not remembered."""
    base = adapted_base()
    step = step_on(base, rule="released")
    micro = MicroBatch([blank(row) for row in ALIGNED], range(4), 0, 0, 8)
    found = step.gradients(micro, torch.zeros(4), torch.Tensor.backward)
    assert (found.loss, found.correct, found.tokens) == (0.0, 0.0, 0)
    assert all(float(g.abs().sum()) == 0 for g in gradients(base))
    assert step.state() == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_adapter_is_refused(dtype: torch.dtype) -> None:
    """M22: the simulated step would be rounded away."""
    base = adapted_base(dtype=torch.float32)
    first, *others = lora.parameters(base, lora.TASK)
    halves = [torch.nn.Parameter(first.detach().to(dtype)), *others]
    arguments = {"harmful": HARMFUL, "refused": REFUSED, "seed": 0}
    with pytest.raises(TypeError, match="fp32"):
        AntibodyAlign(base, uncached(base), AntibodyAlignSettings(), parameters=halves, **arguments)
    AntibodyAlign(
        base, uncached(base), AntibodyAlignSettings(), parameters=lora.parameters(base, lora.TASK), **arguments
    )


def test_checkpointing_changes_no_gradient() -> None:
    """M10: recomputed layers see the weights of their own pass."""
    base = adapted_base()
    plain = delta_of(base, step_on(base))
    base.model.train()
    base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert farthest(delta_of(base, step_on(base)), plain) < 1e-6


def test_slices_of_a_step_weigh_sharpness_as_the_whole_step_does() -> None:
    """M16: lambda compares mean gradients, whatever share of the step a micro-batch holds."""
    base = adapted_base()
    whole = delta_of(base, step_on(base, lambda_refusal=0.0, xi=0.2, lambda_max=1e9))
    half = MicroBatch(ALIGNED, range(4), 0, 0, 8)
    step = step_on(base, lambda_refusal=0.0, xi=0.2, lambda_max=1e9)
    step.gradients(half, even(8)[:4], torch.Tensor.backward)
    assert farthest([2 * g for g in gradients(base)], whole) < 1e-9
    assert math.isfinite(norm(whole))


def test_accumulation_adds_up() -> None:
    """M8: gradients that lie there are added to, never overwritten."""
    base = adapted_base()
    delta = delta_of(base, step_on(base))
    for parameter in lora.parameters(base, lora.TASK):
        parameter.grad = torch.ones_like(parameter)
    step_on(base).gradients(MicroBatch(ALIGNED, range(4), 0, 0, 4), even(4), torch.Tensor.backward)
    assert farthest([g - 1 for g in gradients(base)], delta) < 1e-12

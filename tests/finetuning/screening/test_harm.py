"""Facts about the probability of harm: what the probe measures, how two readings are weighed, and where .5 lies."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetuning.screening.harm import HarmModel, fit_direction, fit_odds, margin


def clouds(distance: float, *, seed: int = 0, n: int = 400, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Harmful and benign states: two normal clouds of unequal spreads by axis, apart along all axes."""
    torch.manual_seed(seed)
    spread = torch.linspace(0.5, 3.0, size)
    return torch.randn(n, size) * spread + distance * spread / size**0.5, torch.randn(n, size) * spread


def test_the_probe_is_in_deviations_of_a_class_and_0_half_way() -> None:
    harmful, benign = clouds(4.0)
    found = fit_direction(harmful, benign)
    high, low = found.of(harmful), found.of(benign)
    assert float(high.mean() + low.mean()) == pytest.approx(0, abs=1e-6)
    assert float(high.mean() - low.mean()) == pytest.approx(4.0, abs=0.3)
    assert float(torch.cat([high - high.mean(), low - low.mean()]).square().mean().sqrt()) == pytest.approx(1, abs=1e-4)


def test_the_probe_finds_what_it_has_not_seen() -> None:
    found = fit_direction(*clouds(4.0))
    harmful, benign = clouds(4.0, seed=1)
    assert float((found.of(harmful) > 0).double().mean()) > 0.95
    assert float((found.of(benign) < 0).double().mean()) > 0.95


def test_a_direction_survives_fewer_rows_than_dimensions() -> None:
    """Off the diagonal the covariance counts a tenth, so it can be solved and does not learn the rows by heart."""
    harmful, benign = clouds(5.0, n=40, size=300)
    found = fit_direction(harmful, benign)
    others = clouds(5.0, seed=2, n=200, size=300)
    assert float((found.of(others[0]) > 0).double().mean()) > 0.9
    assert float((found.of(others[1]) < 0).double().mean()) > 0.9


def odds_of(harmful: list[float], benign: list[float], *, mass: tuple[float, float] = (3.0, -3.0)) -> HarmModel:
    """Weighed by probe values and one mass margin a class."""
    pairs = [
        (torch.tensor(values), torch.full((len(values),), m)) for values, m in zip((harmful, benign), mass, strict=True)
    ]
    return HarmModel((1.0,), 0.0, fit_odds(*pairs), 0.0)


def probability(model: HarmModel, probe: float, mass: float) -> float:
    return float(model.probability(torch.tensor([probe]), torch.tensor([mass]), 0.5))


def test_two_of_a_hundred_benign_calibration_texts_are_above_the_limit() -> None:
    torch.manual_seed(0)
    benign = torch.randn(1000)
    model = odds_of((torch.randn(500) + 3).tolist(), benign.tolist(), mass=(0.0, 0.0))
    found = model.probability(benign, torch.full((1000,), 0.5), 0.5)
    assert float((found > 0.5).double().mean()) == pytest.approx(0.02, abs=0.002)


def test_half_of_the_harmful_ones_are_caught_whatever_that_costs() -> None:
    torch.manual_seed(0)
    harmful = torch.randn(500)
    model = odds_of(harmful.tolist(), (torch.randn(500) - 0.5).tolist(), mass=(0.0, 0.0))
    found = model.probability(harmful, torch.full((500,), 0.5), 0.5)
    assert float((found >= 0.5).double().mean()) >= 0.5


def test_classes_that_are_apart_meet_where_both_are_as_likely() -> None:
    model = odds_of([4.0, 5.0, 6.0], [-4.0, -5.0, -6.0], mass=(0.0, 0.0))
    assert probability(model, 0.0, 0.5) == pytest.approx(0.5, abs=1e-3)


def test_a_reading_that_points_the_wrong_way_does_not_count() -> None:
    model = odds_of([-1.0, -2.0, -1.5], [1.0, 2.0, 1.5])
    assert model.odds[1] == 0
    assert model.odds[2] > 0


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 1), st.floats(0, 1))
def test_more_of_either_reading_is_never_less_harm(a: float, b: float, m: float, n: float) -> None:
    model = HarmModel((1.0,), 0.0, (-1.0, 1.5, 0.4), 0.0)
    low, high = sorted((a, b)), sorted((m, n))
    assert probability(model, low[0], high[0]) <= probability(model, low[1], high[1])


@pytest.mark.parametrize("threshold", [0.05, 0.5])
def test_a_mass_counts_against_the_threshold_of_its_model(threshold: float) -> None:
    assert float(margin(torch.tensor([threshold]), threshold)) == pytest.approx(0, abs=1e-6)
    assert bool(torch.isfinite(margin(torch.tensor([0.0, 1.0]), threshold)).all())
    assert bool(torch.isfinite(margin(torch.tensor([0.3]), 0.0)).all())


def test_the_probe_of_a_model_is_that_of_its_direction() -> None:
    found = fit_direction(*clouds(3.0))
    states = clouds(3.0, seed=3)[0]
    model = HarmModel(tuple(found.direction.tolist()), found.offset, (0.0, 1.0, 1.0), 0.0)
    assert torch.allclose(model.probe(states), found.of(states))

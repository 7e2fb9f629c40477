"""Facts about Safe LoRA: the low-rank algebra equals the dense formulas, and only what disagrees is touched."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetuning.contract.recipe import SafeLoraSettings
from finetuning.defences.safe_lora import projected
from finetuning.model.lora import Adapter, Factors

Projector = Literal["released", "orthogonal"]
PROJECTORS: list[Projector] = ["released", "orthogonal"]
ALL = 1.0  # a threshold that every cosine meets


def factors(seed: int, *, rank: int = 3, out: int = 11, into: int = 7, scale: float = 2.0) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, into, generator=draw, dtype=torch.float64)
    return Factors(a, torch.randn(out, rank, generator=draw, dtype=torch.float64), scale)


def delta(known: Factors) -> torch.Tensor:
    whole: torch.Tensor = known.scale * known.b @ known.a
    return whole


def dense(known: Factors, projector: Projector) -> torch.Tensor:
    """C as the paper's code forms it, or V V^+, both d x d."""
    v = delta(known)
    c: torch.Tensor = v @ v.T / torch.linalg.matrix_norm(v) if projector == "released" else v @ torch.linalg.pinv(v)
    return c


def settings(projector: Projector, threshold: float = ALL) -> SafeLoraSettings:
    return SafeLoraSettings(enabled=True, projector=projector, threshold=threshold)


@pytest.mark.parametrize("projector", PROJECTORS)
@given(seed=st.integers(0, 10**6), ranks=st.tuples(st.integers(1, 9), st.integers(1, 9)), lost=st.booleans())
def test_it_equals_the_dense_formula(projector: Projector, seed: int, ranks: tuple[int, int], lost: bool) -> None:
    """Ranks beyond the map's size and alignments that lost a rank (two equal columns of B) included."""
    task, known = factors(seed, rank=ranks[0], scale=0.5), factors(seed + 1, rank=ranks[1])
    if lost:
        known.b[:, -1] = known.b[:, 0]
    moved = dense(known, projector) @ delta(task)
    cosine = (moved * delta(task)).sum() / moved.norm() / delta(task).norm()
    found = projected({"m": task}, {"m": known}, settings(projector))
    assert torch.allclose(delta(found.adapter["m"]), moved, rtol=0, atol=1e-9 * float(moved.norm()))
    assert found.cosines["m"] == pytest.approx(cosine.item(), abs=1e-9)
    assert found.replaced == 1
    assert torch.equal(found.adapter["m"].a, task.a)
    assert found.adapter["m"].scale == task.scale


@pytest.mark.parametrize("projector", PROJECTORS)
def test_only_modules_up_to_the_threshold_are_replaced_and_the_others_stay_bitwise(projector: Projector) -> None:
    task: Adapter = {f"m{i}": factors(i) for i in range(6)}
    known: Adapter = {path: factors(100 + i) for i, path in enumerate(task)}
    cosines = projected(task, known, settings(projector)).cosines
    for limit in sorted(cosines.values()):
        found = projected(task, known, settings(projector, limit))
        touched = {path for path in task if not torch.equal(found.adapter[path].b, task[path].b)}
        assert touched == {path for path in task if cosines[path] <= limit}
        assert found.replaced == len(touched)
    assert projected(task, known, settings(projector, -1.0)).replaced == 0


@pytest.mark.parametrize("projector", PROJECTORS)
def test_modules_without_anything_to_compare_are_left_alone(projector: Projector) -> None:
    task = {"alone": factors(0), "unaligned": factors(1), "untrained": factors(2)}
    task["untrained"].b.zero_()
    known = {"unaligned": factors(3), "untrained": factors(4), "other": factors(5)}
    known["unaligned"].b.zero_()
    found = projected(task, known, settings(projector))
    assert found.cosines == {}
    assert found.replaced == 0
    assert all(torch.equal(found.adapter[path].b, task[path].b) for path in task)
    assert found.adapter.keys() == task.keys()


def test_what_lies_in_the_alignments_columns_is_kept_by_the_orthogonal_form_only() -> None:
    known = factors(1)
    task = Factors(factors(2).a, known.b @ torch.randn(3, 3, generator=torch.manual_seed(0), dtype=torch.float64), 1.0)
    kept = projected({"m": task}, {"m": known}, settings("orthogonal"))
    assert kept.cosines["m"] == pytest.approx(1.0, abs=1e-12)
    assert torch.allclose(kept.adapter["m"].b, task.b, atol=1e-12)
    bent = projected({"m": task}, {"m": known}, settings("released"))
    assert bent.cosines["m"] < 0.999
    assert not torch.allclose(bent.adapter["m"].b, task.b, atol=1e-3)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_what_leaves_the_alignments_columns_altogether_is_taken_away(projector: Projector) -> None:
    task, known = factors(0), factors(1)
    basis = torch.linalg.qr(known.b).Q
    apart = replace(task, b=task.b - basis @ (basis.T @ task.b))
    found = projected({"m": apart}, {"m": known}, settings(projector, 0.35))
    assert abs(found.cosines["m"]) < 0.35
    assert found.replaced == 1
    assert float(found.adapter["m"].b.abs().max()) < 1e-12


def test_the_orthogonal_form_does_nothing_the_second_time_and_the_released_one_does() -> None:
    task, known = {"m": factors(0)}, {"m": factors(1)}
    apart: dict[Projector, float] = {}
    for projector in PROJECTORS:
        once = projected(task, known, settings(projector)).adapter
        twice = projected(once, known, settings(projector)).adapter
        apart[projector] = float((twice["m"].b - once["m"].b).abs().max())
    assert apart["orthogonal"] < 1e-12
    assert apart["released"] > 1e-3


def test_the_alignments_strength_counts_in_the_released_form_only() -> None:
    task, known = factors(0), factors(1)
    louder = replace(known, scale=3 * known.scale)
    factors_of: dict[Projector, float] = {"released": 3.0, "orthogonal": 1.0}
    for projector, factor in factors_of.items():
        quiet, loud = (projected({"m": task}, {"m": k}, settings(projector)).adapter["m"].b for k in (known, louder))
        assert torch.allclose(loud, factor * quiet, atol=1e-10)


def test_wide_maps_need_no_dense_product() -> None:
    """200,000 outputs: a square matrix of them would hold 320 GB."""
    task, known = factors(0, out=200_000, into=64), factors(1, out=200_000, into=64)
    assert projected({"m": task}, {"m": known}, settings("released")).replaced == 1


def test_half_precision_factors_keep_their_kind() -> None:
    halves = [Factors(f.a.bfloat16(), f.b.bfloat16(), f.scale) for f in (factors(0), factors(1))]
    found = projected({"m": halves[0]}, {"m": halves[1]}, settings("orthogonal"))
    assert found.adapter["m"].b.dtype == torch.bfloat16

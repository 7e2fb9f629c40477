"""Facts about the coordinates of an adapter: methods.md 2.4 (gauge), 3 and 8.5, invariants M38, M39 and M42."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from finetuning.defences.antidote import input_squares, prune, published_scores
from finetuning.model import lora
from finetuning.model.lora import Adapter, Factors
from finetuning.model.lora_coordinates import canonical
from tests.oracles.low_rank import low_rank
from tests.support.models import adapted_base, random_rows, uncached

RANK = 4


def trained() -> Adapter:
    return lora.read(adapted_base(), lora.TASK)


def in_gauge(found: Adapter, make: Callable[[torch.Generator], Tensor]) -> Adapter:
    """The same products in other coordinates: A' = G A, B' = B G^-1, another G for each module."""
    generator = torch.Generator().manual_seed(3)
    out: Adapter = {}
    for path, f in found.items():
        g = make(generator)
        out[path] = Factors(g @ f.a, f.b @ torch.linalg.inv(g), f.scale)
    return out


def diagonal(generator: torch.Generator) -> Tensor:
    sizes = 0.2 + 3 * torch.rand(RANK, generator=generator, dtype=torch.float64)
    return torch.diag(sizes * torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64))


def rotation(generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(RANK, RANK, generator=generator, dtype=torch.float64))[0]


def products(found: Adapter) -> dict[str, Tensor]:
    return {path: f.scale * f.b @ f.a for path, f in found.items()}


def gap(first: Adapter, second: Adapter) -> float:
    """The largest difference between two adapters' products."""
    ours, theirs = products(first), products(second)
    assert ours.keys() == theirs.keys()
    return max(float((ours[path] - theirs[path]).abs().max()) for path in ours)


def pruned(found: Adapter, *, unit: str = "row") -> Adapter:
    """A quarter of every row away, scored on the model that really has these factors."""
    base = adapted_base()
    lora.write(base, lora.TASK, found)
    scores = published_scores(found, input_squares(base, uncached(base), lora.TASK, random_rows(6)))
    return prune(found, scores, 0.25, unit=unit).adapter


def test_row_pruning_sees_through_a_rescaling_but_not_through_a_rotation() -> None:
    """M38: with a mask per row the pruned product is unchanged by a diagonal G, and changed by a rotation."""
    found = trained()
    here = pruned(found)
    assert gap(here, found) > 1e-3
    assert gap(pruned(in_gauge(found, diagonal)), here) < 1e-9
    assert gap(pruned(in_gauge(found, rotation)), here) > 1e-3


def test_pruning_a_whole_matrix_does_not_even_see_through_a_rescaling() -> None:
    """M38: with one ranking for the matrix a diagonal G changes the pruned product too."""
    found = trained()
    assert gap(pruned(in_gauge(found, diagonal), unit="matrix"), pruned(found, unit="matrix")) > 1e-3


@pytest.mark.parametrize("unit", ["row", "matrix"])
@pytest.mark.parametrize("make", [diagonal, rotation])
def test_canonical_coordinates_make_pruning_a_function_of_the_product(
    make: Callable[[torch.Generator], Tensor], unit: str
) -> None:
    """M38: after the canonical gauge neither a diagonal G nor a rotation changes the pruned product."""
    found = trained()
    here = pruned(canonical(found), unit=unit)
    assert gap(here, found) > 1e-3
    assert gap(pruned(canonical(in_gauge(found, make)), unit=unit), here) < 1e-9


def test_canonical_coordinates_keep_the_product_and_balance_it() -> None:
    """M39: B A is kept to 1e-9; B^T B = A A^T is diagonal, the singular values in descending order."""
    found = trained()
    made = canonical(found)
    assert gap(made, found) < 1e-9
    for path, f in made.items():
        assert (f.scale, f.a.shape, f.b.shape) == (found[path].scale, found[path].a.shape, found[path].b.shape)
        inner = f.b.T @ f.b
        values = torch.linalg.svdvals(found[path].b @ found[path].a)[:RANK]
        assert torch.allclose(inner, f.a @ f.a.T, atol=1e-9)
        assert torch.allclose(inner, torch.diag(values), atol=1e-9)


@pytest.mark.parametrize("make", [diagonal, rotation])
def test_canonical_coordinates_are_unique(make: Callable[[torch.Generator], Tensor]) -> None:
    """M39: the factors themselves, signs included, depend on the product alone."""
    found = trained()
    ours, theirs = canonical(found), canonical(in_gauge(found, make))
    for path, f in ours.items():
        assert torch.allclose(f.a, theirs[path].a, atol=1e-8)
        assert torch.allclose(f.b, theirs[path].b, atol=1e-8)
        assert all(float(column[column.abs().argmax()]) > 0 for column in f.b.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_canonical_coordinates_of_a_deficient_product_hold_zeros(dtype: torch.dtype) -> None:
    """M39: unused ranks are zeros, whatever noise they came with; the type stays."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 6, generator=generator), torch.randn(5, 4, generator=generator)
    blank = {
        "none": Factors(a.to(dtype), torch.zeros(5, 4, dtype=dtype), 2.0),
        "two": Factors(torch.cat([a[:2], a[:2]]).to(dtype), b.to(dtype), 0.5),
        "wide": Factors(torch.randn(8, 6, generator=generator).to(dtype), torch.randn(5, 8).to(dtype), 1.0),
    }
    made = canonical(blank)
    assert gap(made, blank) < (1e-5 if dtype == torch.float32 else 1e-12)
    for path, used in (("none", 0), ("two", 2), ("wide", 5)):
        f = made[path]
        assert (f.a.dtype, f.b.dtype) == (dtype, dtype)
        assert int(f.a.ne(0).any(1).sum()) == int(f.b.ne(0).any(0).sum()) == used
        assert float(f.a[used:].abs().sum() + f.b[:, used:].abs().sum()) == 0


def test_fewer_ranks_than_both_adapters_have_lose_what_was_dropped() -> None:
    """M42: at r_a + r_t exact to 1e-5; at max(r_a, r_t) off by the dropped singular values, no more and no less."""
    base = adapted_base(dtype=torch.float32, aligned=True)
    parts = [lora.read(base, name) for name in (lora.ALIGNMENT, lora.TASK)]
    joined = lora.concat(*parts)
    assert gap(low_rank(joined, 2 * RANK), joined) < 1e-5
    small = low_rank(joined, RANK)
    assert gap(small, joined) > 1e-2
    for path, product in products(joined).items():
        lost = torch.linalg.svdvals(product.double())[RANK:].square().sum().sqrt()
        assert float((product - products(small)[path]).norm()) == pytest.approx(float(lost), rel=1e-4)

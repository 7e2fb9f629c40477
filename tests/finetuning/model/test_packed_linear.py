"""Facts about packed linear maps: torch's own product to rounding, its gradients, and no weight behind the times."""

import pytest
import torch
from torch import Tensor, nn

from finetuning.model.packed_linear import PackedLinear, pack

SHAPES = [(300, 260, True), (260, 300, False), (512, 1030, True)]


def pair_of(inputs: int, outputs: int, bias: bool) -> tuple[nn.Linear, PackedLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    return plain, PackedLinear(plain)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs", "bias"), SHAPES)
@pytest.mark.parametrize("rows", [(1,), (3, 7), (2, 1, 5)])
def test_product_and_gradient_are_those_of_torch(inputs: int, outputs: int, bias: bool, rows: tuple[int, ...]) -> None:
    plain, packed = pair_of(inputs, outputs, bias)
    x = torch.randn(*rows, inputs, requires_grad=True)
    ours, theirs = packed(x), plain(x)
    assert close(ours, theirs)
    weights = torch.randn_like(theirs)
    for one, other in zip(
        torch.autograd.grad(ours, x, weights), torch.autograd.grad(theirs, x, weights), strict=True
    ):  # fmt: skip
        assert close(one, other)
    assert torch.equal(packed(x), ours)


def test_a_gradient_can_be_differentiated_again() -> None:
    plain, packed = pair_of(*SHAPES[0])
    x = torch.randn(4, 300, requires_grad=True)

    def second(linear: nn.Linear) -> Tensor:
        (first,) = torch.autograd.grad(linear(x).pow(3).sum(), x, create_graph=True)
        (again,) = torch.autograd.grad(first.pow(2).sum(), x)
        return again

    assert torch.allclose(second(packed), second(plain), rtol=1e-3, atol=1e-3)


def test_inputs_that_lie_scattered_in_memory_are_read_right() -> None:
    plain, packed = pair_of(*SHAPES[0])
    x = torch.randn(300, 6).t()
    assert close(packed(x), plain(x))


def test_a_weight_that_is_written_to_counts_at_once() -> None:
    plain, packed = pair_of(*SHAPES[1])
    x = torch.randn(5, 260, requires_grad=True)
    torch.autograd.grad(packed(x).sum(), x)  # both directions are packed now
    with torch.no_grad():
        plain.weight.mul_(2)
    assert close(packed(x), plain(x))
    assert close(*(torch.autograd.grad(linear(x).sum(), x)[0] for linear in (packed, plain)))


def test_a_weight_that_learns_and_other_dtypes_go_torchs_own_way() -> None:
    plain, packed = pair_of(*SHAPES[0])
    x = torch.randn(2, 300)
    packed.weight.requires_grad_(True)
    packed(x).sum().backward()
    assert packed.weight.grad is not None
    assert packed.double()(x.double()).dtype == torch.float64
    assert plain.weight is not None


def test_only_large_maps_are_exchanged_and_parameters_stay_the_same_objects() -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.Sequential(nn.Linear(8, 8), nn.Linear(300, 300)), nn.Linear(300, 300))
    model[2].weight = model[0].weight  # tied
    names, weight = list(model.state_dict()), model[0].weight
    model.requires_grad_(False)
    pack(model)
    inner = model[1]
    assert isinstance(inner, nn.Sequential)
    assert [type(m) for m in (model[0], inner[0], inner[1], model[2])] == [
        PackedLinear, nn.Linear, PackedLinear, PackedLinear,
    ]  # fmt: skip
    assert list(model.state_dict()) == names
    assert model[0].weight is weight is model[2].weight


def test_a_model_that_calculates_elsewhere_or_in_halves_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(300, 300, dtype=torch.bfloat16), nn.Linear(300, 300, device="meta"))
    pack(model)
    assert all(type(m) is nn.Linear for m in model)

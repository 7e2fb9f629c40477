"""Frozen linear maps on the CPU, with their weights laid out once for oneDNN: the same product in fp32, and faster.

By how much depends on the processor: where the BLAS behind torch takes its slow path, twice (docs/adr/0010). Weights
are kept three times: as they are, and packed for either direction; the packing for gradients is made when a gradient
first comes by.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Below this many weights the calls cost more than the product.
_FEWEST_WEIGHTS = 1 << 16


class _Product(torch.autograd.Function):
    """x @ W.T with W packed; W itself gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: "_Packing", direction: str) -> Tensor:
        ctx.packing, ctx.direction = packing, direction
        return packing.product(x, direction)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # Through the same function, so that a gradient can be differentiated again.
        return _Product.apply(gradients[0], ctx.packing, _OTHER[ctx.direction]), None, None


_OTHER = {"forward": "backward", "backward": "forward"}


class _Packing:
    """A weight (out, in) in oneDNN's layout, in either direction; made anew when the weight was written to.

    A write through `weight.data` is not seen: torch counts none. Nothing here merges an adapter into its base.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._packed: dict[str, tuple[int, Tensor]] = {}

    def product(self, x: Tensor, direction: str) -> Tensor:
        """x (..., in) -> (..., out); `backward`: x (..., out) -> (..., in)."""
        version = self.weight._version
        known = self._packed.get(direction)
        if known is None or known[0] != version:
            weight = self.weight.detach()
            weight = weight.t().contiguous() if direction == "backward" else weight
            known = (version, torch.ops.mkldnn._reorder_linear_weight.default(weight, None))
            self._packed[direction] = known
        made: Tensor = torch.ops.mkldnn._linear_pointwise.default(x.contiguous(), known[1], None, "none", [], "")
        return made


class PackedLinear(nn.Linear):
    """A frozen nn.Linear that shares another's parameters and multiplies with a packed weight."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._packing: _Packing | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name in torch
        """input (..., in) -> (..., out). A weight that learns, another dtype or device takes torch's own way."""
        weight = self.weight
        plain = weight.requires_grad or weight.device.type != "cpu" or input.dtype != torch.float32
        if plain or torch.is_autocast_enabled("cpu"):
            return F.linear(input, weight, self.bias)
        if self._packing is None or self._packing.weight is not weight:
            self._packing = _Packing(weight)
        made: Tensor = _Product.apply(input, self._packing, "forward")
        return made if self.bias is None else made + self.bias


def pack(model: nn.Module) -> None:
    """Exchange every large fp32 nn.Linear of a model on the CPU for a packed one, where this torch can do it."""
    if not can_pack():
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and _is_worth_it(child.weight):
                setattr(module, name, PackedLinear(child))


def can_pack() -> bool:
    """Whether this torch has the operators."""
    operators = ("_reorder_linear_weight", "_linear_pointwise")  # what torch's own compiler freezes a model with
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)


def _is_worth_it(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() > _FEWEST_WEIGHTS

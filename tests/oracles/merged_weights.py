"""Adapters merged into a base's weights: what stacked adapters must be equal to."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetuning.model.base import FrozenBase
from finetuning.model.lora import Factors


@torch.no_grad()
def merged_weights(base: FrozenBase, adapters: Sequence[Mapping[str, Factors]]) -> dict[str, Tensor]:
    """Full weights by module path with every delta added in fp32; only the maps that the adapters touch."""
    out: dict[str, Tensor] = {}
    for adapter in adapters:
        for path, factors in adapter.items():
            module: Any = base.model.get_submodule(path)
            weight = out.get(path, getattr(module, "base_layer", module).weight.detach().cpu().float().clone())
            out[path] = weight + factors.scale * (factors.b.float() @ factors.a.float())
    return out

"""The best approximation of an adapter's products by fewer ranks (Eckart-Young): what delivery by ranks would lose."""

from collections.abc import Mapping

import torch

from finetuning.model.lora import Adapter, Factors


def low_rank(adapter: Mapping[str, Factors], rank: int) -> Adapter:
    """Each scale * B A in at most `rank` ranks, of scale 1, by the dense singular value decomposition in fp64."""
    out: Adapter = {}
    for path, factors in adapter.items():
        u, values, vt = torch.linalg.svd(factors.scale * factors.b.double() @ factors.a.double(), full_matrices=False)
        root = values[:rank].sqrt()
        a, b = root[:, None] * vt[:rank], u[:, :rank] * root
        out[path] = Factors(a.to(factors.a.dtype), b.to(factors.b.dtype), 1.0)
    return out

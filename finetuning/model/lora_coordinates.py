"""Coordinates of a LoRA product: B A = (B G^-1)(G A) for every invertible G, and one choice of G that is unique.

Source: methods.md 8.5. Pruning ranks the entries of B and A, so it depends on G; in canonical coordinates it is a
function of the product alone (for distinct singular values).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from finetuning.model.lora import Adapter, Factors


def canonical(adapter: Mapping[str, Factors]) -> Adapter:
    """The same products and scales in balanced coordinates: B^T B = A A^T = diag(singular values of B A), descending.

    Works in fp64 and returns the dtype that came in. Ranks that the product does not use become zeros.
    """
    out: Adapter = {}
    for path, factors in adapter.items():
        a, b = _balanced(factors)
        out[path] = Factors(a, b, factors.scale)
    return out


def _balanced(factors: Factors) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of the same product, filled up with zeros where its own rank is below r.

    B = Q_B R_B, A^T = Q_A R_A; only the small R_B R_A^T is decomposed. A column's largest entry of B is positive.
    """
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    u, values, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    # Values that are rounding noise have arbitrary directions; as zeros they leave the result unique.
    noise = values.amax() * max(factors.a.shape[1], factors.b.shape[0]) * torch.finfo(torch.float64).eps
    rank = factors.a.shape[0]
    kept = min(rank, int((values > noise).sum()))
    root = values[:kept].sqrt()
    b, a = (q_b @ u[:, :kept]) * root, root[:, None] * (vt[:kept] @ q_a.T)
    largest = b.gather(0, b.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(b)
    full_b, full_a = b.new_zeros(b.shape[0], rank), a.new_zeros(rank, a.shape[1])
    full_b[:, :kept], full_a[:kept] = b * signs, a * signs.T
    return full_a.to(factors.a.dtype), full_b.to(factors.b.dtype)

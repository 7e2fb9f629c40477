"""Coordinates of a LoRA product: B A = (B G^-1)(G A) for every invertible G, and one choice of G that is unique.

Source: methods.md 8.5. Pruning ranks the entries of B and A, so it depends on G; in canonical coordinates it is a
function of the product alone (for distinct singular values). Knows factors only; must not know rows or scores.
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
        a, b = _balanced(factors, factors.a.shape[0], 1.0)
        out[path] = Factors(a, b, factors.scale)
    return out


def refactored(adapter: Mapping[str, Factors], rank: int) -> Adapter:
    """The best approximation of each scale * B A with `rank` ranks (Eckart-Young), of scale 1.

    Exact when the product's own rank is at most `rank`; lossy below (methods.md 3).
    """
    out: Adapter = {}
    for path, factors in adapter.items():
        a, b = _balanced(factors, rank, factors.scale)
        out[path] = Factors(a, b, 1.0)
    return out


def _balanced(factors: Factors, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of scale * B A, cut or filled up with zeros to `rank`.

    B = Q_B R_B, A^T = Q_A R_A; only the small R_B R_A^T is decomposed. A column's largest entry of B is positive.
    """
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    u, values, vt = torch.linalg.svd(scale * (r_b @ r_a.T), full_matrices=False)
    # Values that are rounding noise have arbitrary directions; as zeros they leave the result unique.
    noise = values.amax() * max(factors.a.shape[1], factors.b.shape[0]) * torch.finfo(torch.float64).eps
    kept = min(rank, int((values > noise).sum()))
    root = values[:kept].sqrt()
    b, a = (q_b @ u[:, :kept]) * root, root[:, None] * (vt[:kept] @ q_a.T)
    largest = b.gather(0, b.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(b)
    full_b, full_a = b.new_zeros(b.shape[0], rank), a.new_zeros(rank, a.shape[1])
    full_b[:, :kept], full_a[:kept] = b * signs, a * signs.T
    return full_a.to(factors.a.dtype), full_b.to(factors.b.dtype)

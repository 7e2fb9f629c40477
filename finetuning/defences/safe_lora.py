"""Safe LoRA: project a trained adapter onto what the alignment changed, module by module, where the two disagree.

Source: arXiv:2405.16833, methods.md 5. `released` is the paper's C = V V^T / ||V||_F, which is no projector;
`orthogonal` projects onto V's columns. Deviation: V is the alignment adapter's delta.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finetuning.contract.recipe import SafeLoraSettings
from finetuning.model.lora import Adapter, Factors


@dataclass(frozen=True)
class Projected:
    """The new adapter, cos(dW, C dW) of every module that could be compared, and how many were replaced."""

    adapter: Adapter
    cosines: dict[str, float]
    replaced: int


def projected(task: Mapping[str, Factors], alignment: Mapping[str, Factors], settings: SafeLoraSettings) -> Projected:
    """B <- C B where cos(dW, C dW) <= threshold, dW = s B A; A and every other module stay bitwise.

    Modules that the alignment did not change, or the task, are left alone: there is nothing to compare.
    """
    out, cosines, replaced = dict(task), dict[str, float](), 0
    for path, factors in task.items():
        known = alignment.get(path)
        if known is None or not _changes(known) or not _changes(factors):
            continue
        moved = _toward(known, factors.b.double(), settings)
        cosines[path] = _cosine(factors, moved)
        if cosines[path] <= settings.threshold:
            out[path] = replace(factors, b=moved.to(factors.b.dtype))
            replaced += 1
    return Projected(out, cosines, replaced)


def _toward(known: Factors, b: Tensor, settings: SafeLoraSettings) -> Tensor:
    """C b (out, r) in fp64: with V = U S W^T, C is U S^2 U^T / ||S|| or U U^T, and U (out, rank) is cheap to have."""
    q, r = torch.linalg.qr(known.b.double())
    u, s, _ = torch.linalg.svd(known.scale * (r @ known.a.double()), full_matrices=False)
    if settings.projector == "released":
        strength = s.square() / s.norm()
    else:  # directions that are only rounding are no part of V's column space
        strength = (s > s.max() * max(known.a.shape[1], len(q)) * torch.finfo(s.dtype).eps).to(s)
    columns: Tensor = q @ u
    return torch.matmul(columns, strength[:, None] * (columns.T @ b))


def _cosine(factors: Factors, moved: Tensor) -> float:
    """cos(B A, moved A) by inner products of size r: <X A, Y A> = sum of (X^T Y) * (A A^T); 0 where C B is 0."""
    a, b = factors.a.double(), factors.b.double()
    gram = a @ a.T
    inner, first, second = (float(((x.T @ y) * gram).sum()) for x, y in ((b, moved), (b, b), (moved, moved)))
    lengths = max(first, 0.0) ** 0.5 * max(second, 0.0) ** 0.5
    return inner / lengths if lengths else 0.0


def _changes(factors: Factors) -> bool:
    """Whether B A is not zero."""
    a, b = factors.a.double(), factors.b.double()
    return bool((((b.T @ b) * (a @ a.T)).sum() > 0).item())

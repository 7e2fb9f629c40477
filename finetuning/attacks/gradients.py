"""Which benign rows pull hardest: the scores by which T3's attacker picks outliers.

Knows losses and gradients of one row; must not know defences or files. Sources: arXiv:2505.06843 (gradient norm),
arXiv:2404.01099 (likeness to harmful rows); ours use the adapter's parameters only, as an attacker would train.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from finetuning.model import lora
from finetuning.model.base import BaseModel
from finetuning.model.losses import row_nll
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import encode_pair
from finetuning.safety_rows.invented import Pair

Score = Callable[[Sequence[Pair]], Sequence[float]]


def by_norm(base: BaseModel, cache: PrefixCache, trained: str) -> Score:
    """L2 norm of each row's gradient with respect to the adapter `trained`."""
    return lambda pairs: [float(_gradient(base, cache, trained, pair).norm()) for pair in pairs]


def by_likeness(base: BaseModel, cache: PrefixCache, trained: str, harmful: Sequence[Pair]) -> Score:
    """Cosine between each row's gradient and the mean gradient of `harmful`. Raises ValueError without harmful rows."""
    if not harmful:
        raise ValueError("likeness to harmful rows needs at least one of them")
    toward = torch.stack([_gradient(base, cache, trained, pair) for pair in harmful]).mean(0)
    return lambda pairs: [
        float(torch.cosine_similarity(_gradient(base, cache, trained, pair), toward, dim=0)) for pair in pairs
    ]


def _gradient(base: BaseModel, cache: PrefixCache, trained: str, pair: Pair) -> Tensor:
    """The gradient of the row's mean token loss, all parameters in one vector (P,); .grad stays as it is."""
    row = encode_pair(base.tokenizer, pair.prompt, pair.answer)
    cache.prepare([row.ids])
    loss = row_nll(base, cache, [row]).nll.sum()
    found = torch.autograd.grad(loss, lora.parameters(base, trained))
    return torch.cat([part.flatten() for part in found])

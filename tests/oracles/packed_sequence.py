"""Antibody's score of a row from one packed sequence: what two forwards must be equal to."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from finetuning.model.base import FrozenBase, body, logits
from finetuning.rows.chat_format import EncodedRow


@torch.no_grad()
def packed_scores(base: FrozenBase, row: EncodedRow, refusal: Sequence[int]) -> float:
    """r of one row from a single sequence [prompt | answer | refusal] under a block mask.

    The refusal sees the prompt and itself, its positions restart after the prompt; equals two forwards (invariant M29).
    Needs an attention kernel that takes a 4-D mask.
    """
    p, y, q = row.prompt_tokens, len(row.ids), len(refusal)
    ids = torch.tensor([*row.ids, *refusal], device=base.device)[None]
    positions = torch.tensor([*range(y), *range(p, p + q)], device=base.device)[None]
    allowed = torch.ones(y + q, y + q, device=base.device).tril().bool()
    allowed[y:, p:y] = False
    dtype = next(base.model.parameters()).dtype
    mask = torch.zeros(1, 1, y + q, y + q, device=base.device, dtype=dtype).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )
    hidden = body(base.model)(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    states = hidden.last_hidden_state[0]
    where = [t - 1 for t in range(1, y) if row.is_target[t]]
    own = _mean_nll(base, states[where], [row.ids[t + 1] for t in where])
    other = _mean_nll(base, states[[p - 1, *range(y, y + q - 1)]], list(refusal))
    return other - own


def _mean_nll(base: FrozenBase, hidden: Tensor, labels: Sequence[int]) -> float:
    values = logits(base.model, hidden)
    return float(F.cross_entropy(values, torch.tensor(list(labels), device=values.device)))

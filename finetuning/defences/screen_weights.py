"""Row weights of the screen, and the absolute gate that applies them step by step. Ours (methods.md 8.1), no paper.

No row is scored here: a row's weight is what the screen read of its prompt before training. Antibody's scores, where a
recipe asks for them, stand in antibody.py and go through the same gate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from finetuning.rows.chat_format import EncodedRow
from finetuning.training.strategies import RowWeights


def gated(weights: Tensor, gate: Tensor, *, min_share: float) -> RowWeights:
    """Apply the absolute gate g (rows,) in 0..1: weights g w / max(sum g, 1) in shape of w, rate scaled by mean g.

    Below `min_share` the whole step is skipped: no decay, no moments (methods.md 8.1; Adam undoes mere loss scale).
    """
    mean = float(gate.mean())
    if mean < min_share or float((gate * weights).sum()) <= 0:
        return RowWeights(torch.zeros_like(weights), 0.0)
    values = gate * weights / (gate * weights).sum() * min(1.0, float(gate.sum()))
    return RowWeights(values, mean)


class ScreenWeights:
    """Weighs a step's rows by the screen's weights alone: even ones behind the absolute gate."""

    def __init__(self, gate: Tensor, *, min_share: float) -> None:
        """`gate` (all rows,) in 0..1: the screen's weight of each row that trains."""
        self._gate = gate
        self._min_share = min_share

    def weigh(self, rows: Sequence[EncodedRow], indices: Sequence[int]) -> RowWeights:
        """Weights over all rows of the step; rows without targets weigh 0."""
        has = torch.tensor([float(row.target_tokens > 0) for row in rows])
        even = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64).float()
        return gated(even, self._gate[list(indices)] * has, min_share=self._min_share)

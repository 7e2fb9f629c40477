"""Counting a model's work: rows that go forward and backward through its last layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from finetuning.model.base import FrozenBase
from finetuning.model.hidden_states import first_tensor


@dataclass
class Work:
    """Rows forward and rows backward so far; a decoded token counts as one row."""

    forwards: int = 0
    backwards: int = 0


@contextmanager
def counted(base: FrozenBase) -> Iterator[Work]:
    """Counts while open. A graph that is walked twice counts twice."""
    work = Work()

    def forward(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = first_tensor(output)
        rows = int(hidden.shape[0])
        work.forwards += rows

        def backward(_gradient: Tensor) -> None:
            work.backwards += rows

        if hidden.requires_grad:
            hidden.register_hook(backward)

    handle = base.layers[-1].register_forward_hook(forward)
    try:
        yield work
    finally:
        handle.remove()

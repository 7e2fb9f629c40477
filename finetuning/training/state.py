"""What a run of the training loop is made of, and where it stands."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from finetuning.contract.recipe import OptimiserSettings
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.batches import StepRows
from finetuning.training.strategies import GradientStep, RowWeigher


@dataclass
class TrainSetup:
    """Everything a run of the loop needs. `parameters` are the adapter's, in fixed order; fp32 only. `dropouts` act
    only while gradients form. `lines` name the rows in errors: each one's line in the customer's file."""

    rows: Sequence[EncodedRow]
    batches: StepRows
    step: GradientStep
    weigher: RowWeigher
    parameters: Sequence[nn.Parameter]
    optimiser: OptimiserSettings
    steps: int
    micro_batch_size: int
    seed: int
    save_every: int = 0
    folder: Path | None = None
    fingerprint: str = ""
    attempt: int = 1
    dropouts: Sequence[nn.Module] = ()
    lines: Sequence[int] = ()
    adam: torch.optim.AdamW = field(init=False)

    def saves_to(self, folder: Path, *, fingerprint: str, every: int, attempt: int = 1) -> None:
        """Save a checkpoint into `folder` after every so many steps; `attempt` counts the gate's retries from 1."""
        self.folder, self.fingerprint, self.save_every, self.attempt = folder, fingerprint, every, attempt

    def __post_init__(self) -> None:
        for parameter in self.parameters:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"adapters train in fp32, not {parameter.dtype}: bf16 rounds small steps away")
        o = self.optimiser
        self.adam = torch.optim.AdamW(
            list(self.parameters), lr=o.learning_rate, weight_decay=o.weight_decay, eps=o.epsilon
        )


@dataclass
class LoopState:
    """Where a run stands: the next step (from 0), tokens trained so far, and steps skipped."""

    next_step: int = 0
    tokens: int = 0
    skipped: int = 0

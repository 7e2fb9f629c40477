"""A training run in a process of its own, which kills itself after a given step; started by training/test_loop.py."""

import os
import signal
import sys
from pathlib import Path

import torch

from finetuning.contract.progress import StepDone
from finetuning.contract.recipe import AnchorSettings, AntibodySettings, LoraSettings, OptimiserSettings
from finetuning.defences.anchored import Anchored, KlAnchors
from finetuning.defences.antibody import Antibody
from finetuning.model import lora
from finetuning.model.prefix_cache import PrefixCache
from finetuning.training import checkpoint
from finetuning.training.batches import Stream
from finetuning.training.determinism import make_deterministic
from finetuning.training.loop import train
from finetuning.training.state import LoopState, TrainSetup
from tests.support.models import adapted_base, random_rows

STEPS = 9


def setup_in(folder: Path) -> TrainSetup:
    """Everything that can differ between a fresh and a resumed run: dropout, cache, mixing, gate, scores, momentum."""
    shape = LoraSettings(rank=4, alpha=8.0, trained_layers=1, dropout=0.1)
    base = adapted_base(shape=shape, dtype=torch.float32)
    gate = torch.tensor([1.0, 0.9, 0.0, 1.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.0])
    step = Anchored(
        base, PrefixCache(base, 1), AnchorSettings(mix_share=0.3), refusals=random_rows(3, seed=1),
        benign=random_rows(3, seed=2), anchors=KlAnchors.none(), seed=3,
    )  # fmt: skip
    return TrainSetup(
        rows=random_rows(10), batches=Stream(10, 4, 5), step=step,
        weigher=Antibody(AntibodySettings(min_weight_share=0.4), gate=gate, scores=torch.arange(10.0) / 5),
        parameters=lora.parameters(base, lora.TASK), optimiser=OptimiserSettings(learning_rate=1e-2, weight_decay=0.1),
        steps=STEPS, micro_batch_size=3, seed=7, save_every=1, folder=folder, fingerprint="same",
        dropouts=lora.dropouts(base, lora.TASK),
    )  # fmt: skip


def main(folder: Path, *, resume_from: str, die_after: int) -> None:
    """Train from a checkpoint ("" for none); killed after step `die_after` (0: never), else the adapter is saved."""
    make_deterministic(1)
    setup = setup_in(folder)
    state = checkpoint.restore(setup, folder / resume_from)[0] if resume_from else LoopState()
    for progress in train(setup, state):
        if isinstance(progress, StepDone) and progress.step == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save([[p.detach() for p in setup.parameters], state.tokens, state.skipped], folder / "end.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), resume_from=sys.argv[2], die_after=int(sys.argv[3]))

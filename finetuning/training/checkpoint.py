"""Resumable state of a training loop: adapter, optimiser, counters and the fingerprint of what made them.

Written only between optimiser steps, as safetensors and JSON, data first and manifest last: a folder without a manifest
is no checkpoint.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetuning.contract.progress import CheckpointSaved
from finetuning.training.determinism import processor_name
from finetuning.training.state import LoopState, TrainSetup
from finetuning.training.strategies import Remembers

_FILES = ("adapter.safetensors", "optimizer.safetensors", "strategy.safetensors", "loop.json")


class BadCheckpoint(ValueError):
    """A checkpoint folder is incomplete, altered, or belongs to another shape of adapter."""


def fingerprint(parts: dict[str, str], *, threads: int) -> str:
    """Hash of all that a byte of the result depends on: `parts` (recipe, rows, base) and versions, device, processor,
    threads."""
    facts = {
        **parts, "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "processor": processor_name(),
        "cpu": torch.backends.cpu.get_cpu_capability(), "threads": str(threads),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def save(setup: TrainSetup, state: LoopState, loss: float, accuracy: float) -> CheckpointSaved:
    """Write <folder>/<next step>/ and return the line that announces it."""
    assert setup.folder is not None
    name = str(state.next_step + (setup.attempt - 1) * setup.steps)
    folder = setup.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file({str(i): p.detach().cpu().contiguous() for i, p in enumerate(setup.parameters)}, folder / _FILES[0])
    moments: dict[str, torch.Tensor] = {}
    for i, values in setup.adam.state_dict()["state"].items():
        moments |= {f"{i}.{name}": torch.as_tensor(value).cpu().contiguous() for name, value in values.items()}
    save_file(moments, folder / _FILES[1])
    save_file(setup.step.state() if isinstance(setup.step, Remembers) else {}, folder / _FILES[2])
    loop = {"next_step": state.next_step, "tokens": state.tokens, "skipped": state.skipped, "attempt": setup.attempt}
    (folder / _FILES[3]).write_text(json.dumps({**loop, "fingerprint": setup.fingerprint}), encoding="utf-8")
    manifest = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _FILES}
    (folder / "manifest.json").write_text(json.dumps(manifest, sort_keys=True), encoding="utf-8")
    return CheckpointSaved(
        step=state.next_step, folder=f"{setup.folder.name}/{name}", fingerprint=setup.fingerprint,
        train_loss=loss, train_mean_token_accuracy=accuracy,
    )  # fmt: skip


def restore(setup: TrainSetup, folder: Path) -> tuple[LoopState, bool]:
    """Load a checkpoint into the setup; returns the state and whether the fingerprint is equal (bitwise resume).

    Raises BadCheckpoint; what a host that gave out raises (memory, device, disk) says nothing about the checkpoint.
    """
    _verify(folder)
    try:
        return _load(setup, folder)
    except BadCheckpoint:
        raise
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, SafetensorError) as error:
        if _is_out_of_memory(error):
            raise  # it would condemn every checkpoint in turn
        # whole, but not of this release: a key that is new, a tensor of another shape
        raise BadCheckpoint(f"checkpoint {folder.name} does not fit: {error.__class__.__name__}") from error


def _load(setup: TrainSetup, folder: Path) -> tuple[LoopState, bool]:
    loop: dict[str, Any] = json.loads((folder / _FILES[3]).read_text(encoding="utf-8"))
    adapter = load_file(folder / _FILES[0])
    shapes = [tuple(p.shape) for p in setup.parameters]
    if [tuple(adapter[name].shape) for name in sorted(adapter, key=int)] != shapes:
        raise BadCheckpoint(f"the checkpoint's {len(adapter)} tensors are not of the shape of this job's adapter")
    with torch.no_grad():
        for i, parameter in enumerate(setup.parameters):
            parameter.copy_(adapter[str(i)])
    state = setup.adam.state_dict()
    for name, value in load_file(folder / _FILES[1]).items():
        index, key = name.split(".", 1)
        state["state"].setdefault(int(index), {})[key] = value
    setup.adam.load_state_dict(state)
    if isinstance(setup.step, Remembers):
        setup.step.load_state(load_file(folder / _FILES[2]))
    same = loop["fingerprint"] == setup.fingerprint
    return LoopState(int(loop["next_step"]), int(loop["tokens"]), int(loop["skipped"])), same


def attempt_of(folder: Path) -> int:
    """Which attempt of the retry ladder saved this checkpoint. Raises BadCheckpoint."""
    _verify(folder)
    try:
        return int(json.loads((folder / _FILES[3]).read_text(encoding="utf-8"))["attempt"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"checkpoint {folder.name} does not fit: {error.__class__.__name__}") from error


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory or device gave out; on the CPU torch says so in words only."""
    return isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or "allocate memory" in str(error)


def _verify(folder: Path) -> None:
    try:
        manifest: dict[str, str] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        actual = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _FILES}
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        raise BadCheckpoint(f"checkpoint {folder.name} is incomplete: {error.__class__.__name__}") from error
    if manifest != actual:
        raise BadCheckpoint(f"checkpoint {folder.name} was altered after it was written")

"""Facts about checkpoints: complete or refused, and telling whether a resume is bitwise."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers

import finetuning
from finetuning.contract.order import TrainOrder
from finetuning.contract.recipe import LoraSettings
from finetuning.recipes.library import align_recipe
from finetuning.stages.pipeline import made_of
from finetuning.training import checkpoint
from finetuning.training.checkpoint import BadCheckpoint, fingerprint
from finetuning.training.determinism import code_digest
from finetuning.training.loop import train
from finetuning.training.state import LoopState, TrainSetup
from tests.finetuning.training.test_loop import plain_setup
from tests.support.models import random_rows


def saved(folder: Path) -> tuple[TrainSetup, LoopState, Path]:
    """Two steps, saved."""
    setup = replace(plain_setup(random_rows(4), steps=4), folder=folder, fingerprint="mark")
    state = LoopState()
    loop = train(setup, state)
    next(loop), next(loop)
    line = checkpoint.save(setup, state, 1.5, 0.5)
    assert (line.step, line.fingerprint, line.train_loss) == (2, "mark", 1.5)
    return setup, state, folder / "2"


def test_everything_comes_back(tmp_path: Path) -> None:
    """M45: parameters, moments, the optimiser's step count and the counters, to the bit."""
    setup, state, folder = saved(tmp_path)
    fresh = replace(plain_setup(random_rows(4), steps=4), fingerprint="mark")
    restored, same = checkpoint.restore(fresh, folder)
    assert same
    assert restored == state
    for ours, theirs in zip(fresh.parameters, setup.parameters, strict=True):
        assert torch.equal(ours, theirs)
        mine, other = fresh.adam.state[ours], setup.adam.state[theirs]
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[k], other[k]) for k in mine)


def test_another_fingerprint_is_told(tmp_path: Path) -> None:
    _, _, folder = saved(tmp_path)
    _, same = checkpoint.restore(replace(plain_setup(random_rows(4), steps=4), fingerprint="other"), folder)
    assert not same


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "loop.json", "manifest.json"])
def test_a_missing_file_makes_it_no_checkpoint(name: str, tmp_path: Path) -> None:
    setup, _, folder = saved(tmp_path)
    (folder / name).unlink()
    with pytest.raises(BadCheckpoint, match="incomplete"):
        checkpoint.restore(setup, folder)
    with pytest.raises(BadCheckpoint):
        checkpoint.attempt_of(folder)


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "loop.json"])
def test_an_altered_file_is_refused(name: str, tmp_path: Path) -> None:
    setup, _, folder = saved(tmp_path)
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(BadCheckpoint, match="altered"):
        checkpoint.restore(setup, folder)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    _, _, folder = saved(tmp_path)
    for lora in (LoraSettings(rank=2), LoraSettings(rank=4, target_modules=("q_proj",))):
        other = plain_setup(random_rows(4), shape=lora)
        before = [p.detach().clone() for p in other.parameters]
        with pytest.raises(BadCheckpoint, match="shape"):
            checkpoint.restore(other, folder)
        assert all(torch.equal(a, b) for a, b in zip(before, other.parameters, strict=True))


@pytest.mark.parametrize("changed", [{"tokens": None}, {"next_step": "x"}, {"attempt": None}, {"fingerprint": None}])
def test_a_checkpoint_of_another_release_is_refused_by_name(tmp_path: Path, changed: dict[str, str | None]) -> None:
    """S10: whole, but without what this release reads; any other error would be taken for a fault of the job."""
    setup, _, folder = saved(tmp_path)
    loop = json.loads((folder / "loop.json").read_text())
    for name, value in changed.items():
        loop.pop(name)
        if value is not None:
            loop[name] = value
    (folder / "loop.json").write_text(json.dumps(loop))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["loop.json"] = hashlib.sha256((folder / "loop.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadCheckpoint, match="does not fit"):
        checkpoint.restore(setup, folder)
        checkpoint.attempt_of(folder)


class Hungry:
    """A strategy whose state needs more than any machine has."""

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, _state: dict[str, torch.Tensor]) -> None:
        torch.empty(2**50)

    def __call__(self, *_: object) -> None:
        raise NotImplementedError


def test_memory_that_gives_out_condemns_no_checkpoint(tmp_path: Path) -> None:
    """Review, S10: a RuntimeError of torch's allocator was told as a checkpoint that does not fit, and so the next."""
    setup, _, folder = saved(tmp_path)
    with pytest.raises(RuntimeError, match="allocate memory"):
        checkpoint.restore(replace(setup, step=Hungry()), folder)


def test_a_disk_that_gives_out_condemns_no_checkpoint(tmp_path: Path) -> None:
    """Review, S10: an error of reading (EIO, which address 0 of our own memory gives) was told as incomplete."""
    setup, _, folder = saved(tmp_path)
    (folder / "adapter.safetensors").unlink()
    (folder / "adapter.safetensors").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.restore(setup, folder)


def test_attempts_of_the_ladder_do_not_share_folders(tmp_path: Path) -> None:
    setup, state, folder = saved(tmp_path)
    assert checkpoint.attempt_of(folder) == 1
    line = checkpoint.save(replace(setup, attempt=2, folder=tmp_path), state, 1.0, 0.0)
    assert line.folder.endswith("/6")
    assert checkpoint.attempt_of(tmp_path / "6") == 2


def test_a_checkpoint_holds_numbers_only(tmp_path: Path) -> None:
    """M43: no text, prompt or path of this machine."""
    _, _, folder = saved(tmp_path)
    loop = json.loads((folder / "loop.json").read_text())
    assert loop.keys() == {"next_step", "tokens", "skipped", "attempt", "fingerprint"}
    assert str(tmp_path) not in (folder / "manifest.json").read_text()


def test_the_fingerprint_follows_each_of_its_parts() -> None:
    known = fingerprint({"recipe": "a", "rows": "b"}, threads=2)
    assert fingerprint({"rows": "b", "recipe": "a"}, threads=2) == known
    others = [
        fingerprint({"recipe": "A", "rows": "b"}, threads=2),
        fingerprint({"recipe": "a", "rows": "B"}, threads=2),
        fingerprint({"recipe": "a", "rows": "b"}, threads=1),
    ]
    assert len({known, *others}) == 4


@pytest.mark.parametrize(
    ("module", "name"), [(torch, "__version__"), (transformers, "__version__"), (peft, "__version__")]
)
def test_the_fingerprint_knows_the_libraries(module: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = fingerprint({}, threads=1)
    monkeypatch.setattr(module, name, "0.0.1")
    assert fingerprint({}, threads=1) != known


def test_the_fingerprint_knows_the_processor_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of one instruction set may round differently; what the platform module tells is the same for both."""
    known = fingerprint({}, threads=1)
    monkeypatch.setattr(checkpoint, "processor_name", lambda: "another one")
    assert fingerprint({}, threads=1) != known


def test_a_job_is_fingerprinted_with_the_code_and_the_libraries_that_run_it(tmp_path: Path) -> None:
    """S34: a resume after an upgrade called itself bitwise."""
    order = TrainOrder(job_id="a", recipe=align_recipe("tiny"), base="tiny")
    found = made_of(order, tmp_path)
    assert found["tokenizers"] == tokenizers.__version__
    assert found["cuda"] == str(torch.version.cuda)
    assert found["code"] == code_digest(Path(finetuning.__file__).parent)
    assert {"numpy", "safetensors", "cudnn"} <= found.keys()


def test_another_text_of_the_code_is_another_fingerprint(tmp_path: Path) -> None:
    """S34: also where its version number is the same."""
    package = Path(finetuning.__file__).parent
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    assert code_digest(copy) == code_digest(package)
    other = tmp_path / "other"
    shutil.copytree(package, other)
    with (other / "training" / "loop.py").open("a", encoding="utf-8") as file:
        file.write("# another\n")
    assert code_digest(other) != code_digest(package)

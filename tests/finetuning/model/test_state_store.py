"""Facts about states that outlive a job: no bit changes, no customer's row is kept, and room is bounded. M45."""

from pathlib import Path

import pytest
import torch

from finetuning.contract.recipe import LoraSettings
from finetuning.model.base import FrozenBase
from finetuning.model.prefix_cache import Ids, PrefixCache, key
from finetuning.model.state_store import KeptStates
from tests.support.models import adapted_base, random_rows

TOP = LoraSettings(rank=2, alpha=4.0, trained_layers=1)


def base_and_rows() -> tuple[FrozenBase, list[Ids]]:
    return adapted_base(layers=3, shape=TOP, dtype=torch.float32), [row.ids for row in random_rows(12)]


def leave(base: FrozenBase, folder: Path, own: list[Ids], others: list[Ids]) -> None:
    cache = PrefixCache(base, 2, kept=KeptStates(folder))
    cache.share(own)
    cache.prepare([*others, *own])
    cache.leave()


def test_a_later_job_reads_the_same_bits_and_computes_nothing(tmp_path: Path) -> None:
    """M45: a state from an earlier job equals one computed now, bit for bit."""
    base, rows = base_and_rows()
    leave(base, tmp_path / "kept", rows, [])
    fresh = PrefixCache(base, 2).states(rows)
    calls: list[int] = []
    base.layers[0].register_forward_hook(lambda *_: calls.append(1))
    later = PrefixCache(base, 2, kept=KeptStates(tmp_path / "kept"))
    assert torch.equal(later.states(rows), fresh)
    assert calls == []


def test_only_what_was_shared_is_kept(tmp_path: Path) -> None:
    base, rows = base_and_rows()
    leave(base, tmp_path / "kept", rows[:5], rows[5:])
    kept = KeptStates(tmp_path / "kept")
    assert [key(row) in kept for row in rows] == [True] * 5 + [False] * 7


def test_a_row_that_both_know_is_computed_but_once(tmp_path: Path) -> None:
    """A second job adds what is new to it and no more."""
    base, rows = base_and_rows()
    leave(base, tmp_path / "kept", rows[:5], [])
    leave(base, tmp_path / "kept", rows, [])
    leave(base, tmp_path / "kept", rows, [])
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert all(key(row) in KeptStates(tmp_path / "kept") for row in rows)


def test_the_longest_unused_files_go_first(tmp_path: Path) -> None:
    states = {bytes([i]) * 16: torch.full((4, 8), float(i)) for i in range(3)}
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder, (name, state) in zip(folders, states.items(), strict=True):
        KeptStates(folder, most_bytes=500).add({name: state})
    assert [len(list(folder.glob("*.safetensors"))) for folder in folders] == [0, 1, 1]
    KeptStates(folders[2], most_bytes=500).add({b"x" * 16: torch.zeros(1000)})
    assert [len(list(folder.glob("*.safetensors"))) for folder in folders] == [0, 1, 1]  # too much for any room


def test_a_broken_file_is_removed_and_its_rows_computed_anew(tmp_path: Path) -> None:
    base, rows = base_and_rows()
    leave(base, tmp_path / "kept", rows, [])
    (file,) = (tmp_path / "kept").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    later = PrefixCache(base, 2, kept=KeptStates(tmp_path / "kept"))
    assert torch.equal(later.states(rows), PrefixCache(base, 2).states(rows))
    assert not file.exists()


@pytest.mark.parametrize("folder", ["/proc/nowhere/kept", "/dev/null/kept"])
def test_a_place_that_cannot_be_written_ends_no_job(folder: str) -> None:
    base, rows = base_and_rows()
    leave(base, Path(folder), rows, [])

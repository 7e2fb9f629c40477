from pathlib import Path

import pytest

from finetuning.bases.fetch import FetchFailed, fetch


def _base(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def test_a_local_folder_is_linked_and_found_again(tmp_path: Path) -> None:
    mine, bases = _base(tmp_path / "mine" / "llama"), tmp_path / "bases"
    for _ in range(2):
        assert fetch(str(mine), bases / "llama").resolve() == mine


def test_another_local_folder_of_the_same_name_is_refused_with_advice(tmp_path: Path) -> None:
    mine, other = _base(tmp_path / "mine" / "llama"), _base(tmp_path / "other" / "llama")
    fetch(str(mine), tmp_path / "bases" / "llama")
    with pytest.raises(FetchFailed, match="remove"):
        fetch(str(other), tmp_path / "bases" / "llama")


def test_what_killed_fetches_left_is_cleared_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    bases = tmp_path / "bases"
    (bases / ".no-such-base.making.killed" / "half").mkdir(parents=True)
    with pytest.raises(FetchFailed, match="could not be fetched"):
        fetch("no such base!", bases / "no-such-base")
    assert not list(bases.iterdir())

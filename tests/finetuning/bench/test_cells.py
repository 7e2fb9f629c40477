"""Where a line of the bench says that its figures come from."""

import subprocess
from pathlib import Path

import pytest

from finetuning.bench.cells import _commit


def git(folder: Path, *words: str) -> str:
    name = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *name, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder of a repository with one commit."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "One")
    return library


def test_a_clone_names_its_commit_and_whether_the_library_differs(library: Path) -> None:
    head = git(library, "rev-parse", "--short", "HEAD")
    assert _commit(library) == head
    (library.parent / "notes.txt").write_text("beside the library")
    assert _commit(library) == head
    (library / "__init__.py").write_text("# changed")
    assert _commit(library) == f"{head}-dirty"


def test_a_library_installed_inside_some_repository_does_not_name_that_ones_commit(library: Path) -> None:
    installed = library.parent / "site-packages"
    installed.mkdir()
    (installed / "__init__.py").write_text("")
    assert git(library, "rev-parse", "--short", "HEAD") not in _commit(installed)


def test_without_git_nothing_fails(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert _commit(library)

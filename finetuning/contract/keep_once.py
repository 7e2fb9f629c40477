"""Folders that are made once and then kept: bases, alignments, pulled adapters. Standard library only."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

Say = Callable[[str], None]


def keep_once(
    target: Path,
    make: Callable[[Path], Path],
    *,
    is_whole: Callable[[Path], bool] = Path.exists,
    say: Say = lambda _line: None,
) -> Path:
    """`target`, which appears whole or not at all: what `make` returns inside the scratch folder that it is given.

    One process or thread makes it; others wait and use what it made. What a killed one left is removed by the next,
    and so is a `target` that `is_whole` does not accept. Raises OSError and what `make` raises; nothing is left then.
    """
    if is_whole(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = f".{target.name}.making."
    waiting = f"waiting for another process that makes {target.name}"
    with _locked(target.parent / f".{target.name}.lock", lambda: say(waiting)):
        if is_whole(target):
            return target
        for left in target.parent.iterdir():
            if left.name.startswith(scratch):  # under the lock: whoever made it was killed
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=scratch, dir=target.parent) as folder:
            made = make(Path(folder))
            _remove(target)
            made.rename(target)
    return target


@contextlib.contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `path`; the kernel frees it when its holder ends, however it ends."""
    while True:
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_at(path, lock):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether the open file still has this name: the holder before us removed it, and another may have made its own."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)

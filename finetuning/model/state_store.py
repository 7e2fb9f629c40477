"""States of the operator's own rows, kept on this machine between jobs: every job reads and mixes in the same rows.

Files of tensors by the hash of a row's ids; must never hold a customer's row. One job writes one file, which appears
whole or not at all; together the files stay below a bound, and the longest unused go first.
"""

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# What else a row's bits depend on: how prefix_cache.py groups and pads. Another layout gets another folder.
LAYOUT = "192 tokens, at most 8 rows, multiples of 8, packed maps"
MOST_BYTES = 1 << 30
_SCRATCH = ".writing-"
_DAY = 86_400


class KeptStates:
    """A read-only view of what earlier jobs left in `folder`, and the place for what this one adds."""

    def __init__(self, folder: Path, *, most_bytes: int = MOST_BYTES) -> None:
        self._folder = folder
        self._most = most_bytes
        self._files: dict[bytes, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self._open(path)

    def __contains__(self, name: bytes) -> bool:
        return name in self._files

    def __getitem__(self, name: bytes) -> Tensor:
        """States (T, D) of that row. Raises KeyError."""
        found: Tensor = self._files[name].get_tensor(name.hex())
        return found

    def add(self, states: Mapping[bytes, Tensor]) -> None:
        """Keep states that are not kept yet. Where there is no room, nothing is kept: later jobs compute them."""
        new = {name.hex(): state.cpu().contiguous() for name, state in states.items() if name not in self}
        size = sum(state.numel() * state.element_size() for state in new.values())
        with contextlib.suppress(OSError, SafetensorError):
            if new and self._make_room(size):
                self._folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=self._folder) as scratch:
                    made = Path(scratch) / "states"
                    save_file(new, str(made))
                    made.replace(self._folder / f"{uuid.uuid4().hex}.safetensors")

    def _open(self, path: Path) -> None:
        """Without this file, or where it cannot be read, its rows are computed anew: no job ends for it."""
        with contextlib.suppress(OSError):
            try:
                file = safe_open(str(path), framework="pt")
            except SafetensorError:
                path.unlink(missing_ok=True)  # what a bad disk left
                return
            self._files.update(dict.fromkeys(map(bytes.fromhex, file.keys()), file))
            os.utime(path)  # the longest unused go first

    def _make_room(self, size: int) -> bool:
        """Remove the longest unused files, of other bases too, until `size` more bytes fit; an open one stays read."""
        for left in self._folder.glob(f"{_SCRATCH}*"):
            if time.time() - left.stat().st_mtime > _DAY:  # its job was killed while it wrote
                shutil.rmtree(left, ignore_errors=True)
        if size > self._most:
            return False
        files = sorted(self._folder.parent.glob("*/*.safetensors"), key=lambda path: path.stat().st_mtime)
        used = sum(path.stat().st_size for path in files)
        for path in files:
            if used + size <= self._most:
                break
            used -= path.stat().st_size
            path.unlink(missing_ok=True)
        return True

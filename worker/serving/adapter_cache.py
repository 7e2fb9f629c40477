"""Adapters on the model server's disk: pulled from the blob store by name, checked, kept until others need the room.

The names are those of `app.core.models.Target.served`.
"""

import os
import re
import shutil
import threading
from pathlib import Path

import structlog

from app.core.models import PUBLIC_BASE
from app.core.storage.blobs import Blob, BlobMissing, BlobStore, CorruptBlob, fetch_file
from finetuning.contract.keep_once import keep_once
from finetuning.model.digest import ABOUT_FILE, PARITY_FILE, BaseFiles, OtherBase, require_same_base
from worker.archive import BadArchive, unpack
from worker.serving.engine import ServedAdapter

_log = structlog.get_logger(__name__)

FILES = ("adapter_config.json", "adapter_model.safetensors")
_SAY_THE_BASE = (ABOUT_FILE, PARITY_FILE)
MAX_ADAPTER_BYTES = 2 * 2**30

_NAME = re.compile(r"(?P<key>[A-Za-z0-9][A-Za-z0-9_./-]{0,400})@(?P<sha256>[0-9a-f]{64}):(?P<size>[0-9]{1,12})")


class UnknownAdapter(Exception):
    """The name is no adapter's, or the store has no such blob."""


class BadAdapter(Exception):
    """The blob is not what its name promises: another digest, no archive of ours, or files missing; or it was made over
    another base than the one that is loaded."""


class AdapterCache:
    """Least recently used adapters leave when the folder grows over `limit_bytes`; the newest one always stays."""

    def __init__(
        self, blobs: BlobStore, folder: Path, *, limit_bytes: int = 4 * 2**30, base: BaseFiles | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._base = base or BaseFiles()
        self._blobs = blobs
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()  # of the eviction alone

    def pull(self, name: str) -> ServedAdapter | None:
        """The adapter behind a served name, on disk; None for the public base. Raises UnknownAdapter, BadAdapter."""
        if name == PUBLIC_BASE:
            return None
        found = _NAME.fullmatch(name)
        if found is None:
            raise UnknownAdapter(name[:80])
        blob = Blob(found["key"], int(found["size"]), found["sha256"])
        target = self._folder / blob.sha256
        while not self._keeps(target):
            # waits for whoever pulls this very adapter, and for nobody else
            keep_once(target, lambda scratch: self._download(blob, scratch))
            _log.info("adapter.pulled", key=blob.key, size_bytes=blob.size_bytes)
        try:
            if not require_same_base(target, self._base):
                _log.info("adapter.base_unsaid", key=blob.key)  # of an earlier release: it cannot be checked
        except OtherBase as problem:
            raise BadAdapter(f"{blob.key}: {problem}") from problem
        return ServedAdapter(f"served_{blob.sha256[:24]}", target)

    def _download(self, blob: Blob, scratch: Path) -> Path:
        """A folder inside `scratch` with the two files that peft reads, and what says over which base they are."""
        if blob.size_bytes > MAX_ADAPTER_BYTES:
            raise BadAdapter(f"{blob.key} is larger than {MAX_ADAPTER_BYTES} bytes")
        archive, unpacked, adapter = scratch / "adapter.zip", scratch / "unpacked", scratch / "adapter"
        try:
            fetch_file(self._blobs, blob, archive)
        except (BlobMissing, ValueError):
            raise UnknownAdapter(blob.key) from None
        except CorruptBlob:
            raise BadAdapter(f"{blob.key} is not the blob that its name promises") from None
        adapter.mkdir()
        try:
            unpack(archive, unpacked)
            for name in FILES:
                (unpacked / name).rename(adapter / name)
            for name in _SAY_THE_BASE:
                if (unpacked / name).exists():
                    (unpacked / name).rename(adapter / name)
        except (BadArchive, FileNotFoundError) as problem:
            raise BadAdapter(f"{blob.key} is no adapter: {problem}") from problem
        return adapter

    def _keeps(self, target: Path) -> bool:
        """Whether it is on disk, and now the newest there; others may have had to leave for it."""
        with self._lock:
            if not target.is_dir():
                return False
            os.utime(target)
            self._evict(target)
            return True

    def _evict(self, newest: Path) -> None:
        kept_bytes = 0
        folders = [path for path in self._folder.iterdir() if len(path.name) == 64]
        for path in sorted(folders, key=lambda path: (path == newest, path.stat().st_mtime), reverse=True):
            kept_bytes += sum(file.stat().st_size for file in path.iterdir())
            if kept_bytes > self._limit_bytes and path != newest:
                shutil.rmtree(path)

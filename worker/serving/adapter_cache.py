"""Adapters on the model server's disk: pulled from the blob store by name, checked, kept until others need the room.

Knows artifact zips and the names on the model server's wire (`app.core.models.Target.served`); must not know models
or requests.
"""

import os
import re
import shutil
import tempfile
import threading
import zipfile
from pathlib import Path

import structlog

from app.core.models import PUBLIC_BASE
from app.core.storage.blobs import Blob, BlobMissing, BlobStore, CorruptBlob, fetch_file
from worker.serving.engine.engine import Adapter

log = structlog.get_logger(__name__)

FILES = ("adapter_config.json", "adapter_model.safetensors")
MAX_ADAPTER_BYTES = 2 * 2**30

_NAME = re.compile(r"(?P<key>[A-Za-z0-9][A-Za-z0-9_./-]{0,400})@(?P<sha256>[0-9a-f]{64}):(?P<size>[0-9]{1,12})")


class UnknownAdapter(Exception):
    """The name is no adapter's, or the store has no such blob."""


class BadAdapter(Exception):
    """The blob is not what its name promises: another digest, no zip, or files missing."""


class AdapterCache:
    """Least recently used adapters leave when the folder grows over `limit_bytes`; the newest one always stays."""

    def __init__(self, blobs: BlobStore, folder: Path, *, limit_bytes: int = 4 * 2**30) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._blobs = blobs
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()

    def pull(self, name: str) -> Adapter | None:
        """The adapter behind a wire name, on disk; None for the public base. Raises UnknownAdapter, BadAdapter."""
        if name == PUBLIC_BASE:
            return None
        found = _NAME.fullmatch(name)
        if found is None:
            raise UnknownAdapter(name[:80])
        blob = Blob(found["key"], int(found["size"]), found["sha256"])
        target = self._folder / blob.sha256
        with self._lock:
            if not target.is_dir():
                self._download(blob, target)
                self._evict(target)
            os.utime(target)
        return Adapter(f"served_{blob.sha256[:24]}", target)

    def _download(self, blob: Blob, target: Path) -> None:
        if blob.size_bytes > MAX_ADAPTER_BYTES:
            raise BadAdapter(f"{blob.key} is larger than {MAX_ADAPTER_BYTES} bytes")
        with tempfile.TemporaryDirectory(dir=self._folder, prefix="pull-") as scratch:
            archive, unpacked = Path(scratch) / "adapter.zip", Path(scratch) / "unpacked"
            try:
                fetch_file(self._blobs, blob, archive)
            except (BlobMissing, ValueError):
                raise UnknownAdapter(blob.key) from None
            except CorruptBlob:
                raise BadAdapter(f"{blob.key} is not the blob that its name promises") from None
            unpacked.mkdir()
            _unpack(archive, unpacked)
            unpacked.rename(target)
        log.info("adapter.pulled", key=blob.key, size_bytes=blob.size_bytes)

    def _evict(self, newest: Path) -> None:
        kept_bytes = 0
        folders = [path for path in self._folder.iterdir() if len(path.name) == 64]
        for path in sorted(folders, key=lambda path: (path == newest, path.stat().st_mtime), reverse=True):
            kept_bytes += sum(file.stat().st_size for file in path.iterdir())
            if kept_bytes > self._limit_bytes and path != newest:
                shutil.rmtree(path)


def _unpack(archive: Path, folder: Path) -> None:
    """Copy the two files that peft reads; everything else in the zip stays there."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            for name in FILES:
                if zipped.getinfo(name).file_size > MAX_ADAPTER_BYTES:
                    raise BadAdapter(f"{name} is larger than {MAX_ADAPTER_BYTES} bytes")
                with zipped.open(name) as source, (folder / name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    except (zipfile.BadZipFile, KeyError) as problem:
        raise BadAdapter(f"not an adapter zip: {problem}") from problem

"""Blobs as files in one folder: the store of a service on one machine."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from uuid import uuid4

from app.core.errors import StorageFull
from app.core.storage.blobs.store import Blob, BlobExists, BlobMissing, StoredBlob, check_key, read_range

_INCOMING = ".incoming"


@dataclass(frozen=True)
class FolderBlobs:
    """Blobs as files below `root`; a blob appears whole or not at all, also across a power cut."""

    root: Path
    free_bytes: int = 0

    def put(self, key: str, chunks: Iterable[bytes]) -> Blob:
        """See BlobStore. StorageFull also when the disk falls below its low-water mark."""
        target = self._path(key)
        if target.exists():
            raise BlobExists(key)
        incoming = self.root / _INCOMING / uuid4().hex
        try:
            incoming.parent.mkdir(parents=True, exist_ok=True)
            blob = self._write(incoming, key, chunks)
            made = _make_folders(target.parent)
            os.link(incoming, target)  # unlike a rename, a link refuses to replace
            for folder in (target.parent, *(new.parent for new in made)):
                _sync_folder(folder)
        except FileExistsError as error:
            raise BlobExists(key) from error
        except OSError as error:
            if error.errno in (ENOSPC, EDQUOT):
                raise _storage_full() from error
            raise
        finally:
            incoming.unlink(missing_ok=True)
        return blob

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """See BlobStore."""
        path = self._path(key)
        if not path.is_file():
            raise BlobMissing(key)
        return read_range(path, start, path.stat().st_size if end is None else end)

    def delete(self, key: str) -> None:
        """See BlobStore. Folders stay: removing one could race with a put into it."""
        self._path(key).unlink(missing_ok=True)

    def list(self, prefix: str) -> Iterator[StoredBlob]:
        """See BlobStore."""
        now = time.time()  # file times come from this machine's clock, so ages do too
        top = self.root / prefix.rpartition("/")[0]
        for folder, folders, names in os.walk(top):
            folders[:] = [name for name in folders if name != _INCOMING]
            for name in names:
                path = Path(folder) / name
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix):
                    with suppress(FileNotFoundError):
                        found = path.stat()
                        yield StoredBlob(key, found.st_size, now - found.st_mtime)

    def discard_unfinished(self, older_than_seconds: float) -> int:
        """See BlobStore."""
        now, removed = time.time(), 0
        for path in (self.root / _INCOMING).glob("*"):
            with suppress(FileNotFoundError):
                if now - path.stat().st_mtime >= older_than_seconds:
                    path.unlink()
                    removed += 1
        return removed

    def _path(self, key: str) -> Path:
        check_key(key)
        return self.root / key

    def _write(self, path: Path, key: str, chunks: Iterable[bytes]) -> Blob:
        digest, size_bytes = hashlib.sha256(), 0
        with path.open("xb") as file:
            for chunk in chunks:
                if shutil.disk_usage(self.root).free < self.free_bytes + len(chunk):
                    raise _storage_full()
                digest.update(chunk)
                size_bytes += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return Blob(key, size_bytes, digest.hexdigest())


def _storage_full() -> StorageFull:
    return StorageFull("The storage is full; nothing was kept. Delete files you no longer need or ask the operator.")


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder; what was made, the deepest first: the name of each lies in its parent, which must be synced."""
    absent: list[Path] = []
    while not folder.is_dir():
        absent.append(folder)
        folder = folder.parent
    for new in reversed(absent):
        new.mkdir(exist_ok=True)
    return absent


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

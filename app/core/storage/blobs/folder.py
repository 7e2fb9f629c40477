"""Blobs as files in one folder: the store of a service on one machine."""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, ENOSPC, errorcode
from pathlib import Path
from uuid import uuid4

import structlog

from app.core.errors import StorageFull, StoreDown
from app.core.storage.blobs.store import (
    Blob,
    BlobExists,
    BlobMissing,
    SourceFailed,
    StoredBlob,
    check_key,
    from_source,
    read_range,
    storage_full,
    store_down,
)

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_INCOMING = ".incoming"
_FULL = (ENOSPC, EDQUOT, EFBIG)


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
            blob = self._write(incoming, key, from_source(chunks))
            made = _make_folders(target.parent)
            os.link(incoming, target)  # unlike a rename, a link refuses to replace
            for folder in (target.parent, *(new.parent for new in made)):
                _sync_folder(folder)
        except FileExistsError as error:
            raise BlobExists(key) from error
        except OSError as error:
            raise _trouble(error) from error
        except SourceFailed as failed:
            raise failed.__cause__ or failed from None
        finally:
            with suppress(OSError):
                incoming.unlink(missing_ok=True)
        return blob

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """See BlobStore."""
        path = self._path(key)
        try:
            size_bytes = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            if self.root.exists() and not self.root.is_dir():
                raise _trouble(error) from error
            raise BlobMissing(key) from error
        except OSError as error:
            raise _trouble(error) from error
        return _reading(key, read_range(path, start, size_bytes if end is None else end))

    def delete(self, key: str) -> None:
        """See BlobStore. Folders stay: removing one could race with a put into it."""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            raise _trouble(error) from error

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
        """See BlobStore. Whoever still writes one holds its lock, which the end of a process lets go."""
        now, removed = time.time(), 0
        for path in (self.root / _INCOMING).glob("*"):
            with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
                if now - path.stat().st_mtime >= older_than_seconds:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                    removed += 1
        return removed

    def _path(self, key: str) -> Path:
        check_key(key)
        return self.root / key

    def _write(self, path: Path, key: str, chunks: Iterable[bytes]) -> Blob:
        digest, size_bytes = hashlib.sha256(), 0
        with path.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for chunk in chunks:
                if shutil.disk_usage(self.root).free < self.free_bytes + len(chunk):
                    raise storage_full()
                digest.update(chunk)
                size_bytes += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return Blob(key, size_bytes, digest.hexdigest())


def _reading(key: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from chunks
    except FileNotFoundError as error:  # deleted since
        raise BlobMissing(key) from error
    except OSError as error:
        raise _trouble(error) from error


def _trouble(error: OSError) -> StorageFull | StoreDown:
    """What an error of the file system means to the store's users."""
    if error.errno in _FULL:
        return storage_full()
    _log.error("store.trouble", reason=errorcode.get(error.errno or 0, type(error).__name__))
    return store_down()


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

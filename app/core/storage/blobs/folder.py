"""Stored bytes: the store's protocol and the folder store.

Knows keys, sizes and digests; must not know what the bytes mean. Keys are immutable: nothing is overwritten.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from importlib import import_module
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from app.core.errors import StorageFull
from app.core.settings import Settings

CHUNK_BYTES = 2**20
_INCOMING = ".incoming"
_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


@dataclass(frozen=True)
class Blob:
    """Bytes that were stored under `key`; `sha256` is lower-case hex."""

    key: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredBlob:
    """An entry of a listing; `age_seconds` counts from the last write, by the store's own clock."""

    key: str
    size_bytes: int
    age_seconds: float


class BlobExists(Exception):
    """The key is taken; keys are never overwritten."""


class BlobMissing(Exception):
    """There is no such key."""


class CorruptBlob(Exception):
    """Bytes that came back differ from their recorded size or sha256."""


class BlobStore(Protocol):
    """Where bytes live."""

    def put(self, key: str, chunks: Iterable[bytes]) -> Blob:
        """Store a stream under a new key, all or nothing. Raises BlobExists, StorageFull."""
        ...

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes [start, end) in chunks of up to 1 MiB; raises BlobMissing at the call, not later."""
        ...

    def delete(self, key: str) -> None:
        """Remove a key; removing an absent key is fine."""
        ...

    def list(self, prefix: str) -> Iterator[StoredBlob]:
        """All keys that begin with `prefix`, in any order."""
        ...

    def discard_unfinished(self, older_than_seconds: float) -> int:
        """Remove what uploads left that were cut off and never became a blob. Returns how many."""
        ...


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
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(incoming, target)  # unlike a rename, a link refuses to replace
            _sync_folder(target.parent)
        except FileExistsError as error:
            raise BlobExists(key) from error
        except OSError as error:
            if error.errno in (ENOSPC, EDQUOT):
                raise storage_full() from error
            raise
        finally:
            incoming.unlink(missing_ok=True)
        return blob

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """See BlobStore."""
        path = self._path(key)
        if not path.is_file():
            raise BlobMissing(key)
        return _read_range(path, start, path.stat().st_size if end is None else end)

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
                    raise storage_full()
                digest.update(chunk)
                size_bytes += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return Blob(key, size_bytes, digest.hexdigest())


def open_blobs(settings: Settings) -> BlobStore:
    """The store behind `settings.blob_url`: file:///folder or s3://bucket/prefix. Raises ValueError on others."""
    url = urlsplit(settings.blob_url)
    match url.scheme:
        case "file":
            root = Path(unquote(url.path))
            root.mkdir(parents=True, exist_ok=True)
            return FolderBlobs(root, settings.limits.free_bytes)
        case "s3":
            # by name: that module imports this one, and only hosts with S3 need to load the object-store library
            store: BlobStore = import_module("app.core.storage.blobs.objects").open_s3(settings.blob_url)
            return store
        case _:
            raise ValueError(f"IMMUNOTUNE_BLOB_URL must begin with file:/// or s3://, not {url.scheme!r}.")


def check_key(key: str) -> None:
    """Raises ValueError unless the key is plain names joined by slashes; ids make keys, never clients."""
    if not _KEY.fullmatch(key) or len(key) > 512:
        raise ValueError(f"not a blob key: {key[:80]!r}")


def put_file(store: BlobStore, key: str, path: Path) -> Blob:
    """Store a local file. Raises BlobExists, StorageFull."""
    return store.put(key, _read_range(path, 0, path.stat().st_size))


def put_bytes(store: BlobStore, key: str, data: bytes) -> Blob:
    """Store a small value. Raises BlobExists, StorageFull."""
    return store.put(key, [data])


def fetch_file(store: BlobStore, blob: Blob, path: Path) -> None:
    """Copy a blob to a new local file and verify size and sha256. Raises BlobMissing, CorruptBlob."""
    digest, size_bytes = hashlib.sha256(), 0
    chunks = store.read(blob.key)
    with path.open("xb") as file:
        for chunk in chunks:
            digest.update(chunk)
            size_bytes += file.write(chunk)
    if (size_bytes, digest.hexdigest()) != (blob.size_bytes, blob.sha256):
        path.unlink()
        raise CorruptBlob(blob.key)


def read_bytes(store: BlobStore, key: str) -> bytes:
    """A small blob as a whole. Raises BlobMissing."""
    return b"".join(store.read(key))


def storage_full() -> StorageFull:
    """The one wording for a full store."""
    return StorageFull("The storage is full; nothing was kept. Delete files you no longer need or ask the operator.")


def _read_range(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (chunk := file.read(min(CHUNK_BYTES, end - start))):
            start += len(chunk)
            yield chunk


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

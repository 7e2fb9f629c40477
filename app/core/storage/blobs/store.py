"""Stored bytes: what every blob store does, and small values and local files in and out of one.

Keys are immutable: nothing is overwritten. What the bytes mean is their owner's business.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from app.core.errors import StorageFull, StoreDown

CHUNK_BYTES = 2**20
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


class SourceFailed(Exception):
    """Whoever makes the bytes of a put failed, not the store; its own error is the cause."""


class BlobStore(Protocol):
    """Where bytes live. Every call, and the reading of what a call returns, may raise StoreDown."""

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


def storage_full() -> StorageFull:
    """What a store without room answers."""
    return StorageFull("The storage is full; nothing was kept. Delete files you no longer need or ask the operator.")


def store_down() -> StoreDown:
    """What stands for any other trouble of a store; its own words are for the log alone."""
    return StoreDown("The file storage does not answer. Retry in a few seconds.", retry_after=5.0)


def from_source(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks; an error of their maker comes as SourceFailed, so that nobody takes it for one of the store."""
    try:
        yield from chunks
    except Exception as error:
        raise SourceFailed from error


def check_key(key: str) -> None:
    """Raises ValueError unless the key is plain names joined by slashes; ids make keys, never clients."""
    if not _KEY.fullmatch(key) or len(key) > 512:
        raise ValueError(f"not a blob key: {key[:80]!r}")


def put_file(store: BlobStore, key: str, path: Path) -> Blob:
    """Store a local file. Raises BlobExists, StorageFull."""
    return store.put(key, read_range(path, 0, path.stat().st_size))


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


def read_range(path: Path, start: int, end: int) -> Iterator[bytes]:
    """The bytes [start, end) of a local file in chunks."""
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (chunk := file.read(min(CHUNK_BYTES, end - start))):
            start += len(chunk)
            yield chunk

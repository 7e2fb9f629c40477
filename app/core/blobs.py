"""Stored bytes: the store's protocol and the folder store.

Knows keys, sizes and digests; must not know what the bytes mean. Keys are immutable: nothing is overwritten.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from app.core.settings import Settings


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


def open_blobs(settings: Settings) -> BlobStore:
    """The store behind `settings.blob_url`: file:///folder or s3://bucket/prefix. Raises ValueError on others."""
    raise NotImplementedError


def put_file(store: BlobStore, key: str, path: Path) -> Blob:
    """Store a local file. Raises BlobExists, StorageFull."""
    raise NotImplementedError


def put_bytes(store: BlobStore, key: str, data: bytes) -> Blob:
    """Store a small value. Raises BlobExists, StorageFull."""
    raise NotImplementedError


def fetch_file(store: BlobStore, blob: Blob, path: Path) -> None:
    """Copy a blob to a local file and verify size and sha256. Raises BlobMissing, CorruptBlob."""
    raise NotImplementedError


def read_bytes(store: BlobStore, key: str) -> bytes:
    """A small blob as a whole. Raises BlobMissing."""
    raise NotImplementedError


class CorruptBlob(Exception):
    """Bytes that came back differ from their recorded size or sha256."""

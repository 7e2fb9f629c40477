"""The blob store as an attempt sees it: what keeps it from answering is trouble of the store, and of nobody else."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from app.core.errors import StorageFull
from app.core.storage.blobs import Blob, BlobMissing, BlobStore, StoredBlob
from app.core.storage.identity import id_in_store

T = TypeVar("T")


class StoreTrouble(Exception):
    """The store did not do what it was asked to; the cause is chained. Asked again later, it may."""


@dataclass(frozen=True)
class WatchedStore:
    """Any store; errors that say nothing about a blob become StoreTrouble.

    So does BlobExists: an attempt writes under a prefix of its own, so the key is there because the answer to an
    earlier try was lost.
    """

    store: BlobStore

    def put(self, key: str, chunks: Iterable[bytes]) -> Blob:
        """See BlobStore. Raises StorageFull, StoreTrouble."""
        return _watched(lambda: self.store.put(key, chunks))

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """See BlobStore. Raises BlobMissing at the call, StoreTrouble then or later."""
        return _watched_chunks(_watched(lambda: self.store.read(key, start=start, end=end)))

    def delete(self, key: str) -> None:
        """See BlobStore. Raises StoreTrouble."""
        _watched(lambda: self.store.delete(key))

    def list(self, prefix: str) -> Iterator[StoredBlob]:
        """See BlobStore."""
        return self.store.list(prefix)

    def discard_unfinished(self, older_than_seconds: float) -> int:
        """See BlobStore."""
        return self.store.discard_unfinished(older_than_seconds)


def require_store(store: BlobStore) -> None:
    """Raises StoreTrouble where nothing of the deployment is found: a volume that is not mounted misses every blob."""
    if _watched(lambda: id_in_store(store)) is None:
        raise StoreTrouble("the store holds no deployment's id")


def _watched(ask: Callable[[], T]) -> T:
    try:
        return ask()
    except (StorageFull, BlobMissing):
        raise
    except Exception as error:
        raise StoreTrouble(type(error).__name__) from error


def _watched_chunks(chunks: Iterator[bytes]) -> Iterator[bytes]:
    while True:
        chunk = _watched(lambda: next(chunks, None))
        if chunk is None:
            return
        yield chunk

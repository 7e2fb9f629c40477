"""A real blob store behind a connection that breaks: what it is told to, it answers with an error."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from app.core.storage.blobs import Blob, BlobStore, StoredBlob


@dataclass
class SickStore:
    """Passes on to `store`; reads and puts of keys for which `is_sick` says so raise ConnectionError."""

    store: BlobStore
    is_sick: Callable[[str], bool]

    def put(self, key: str, chunks: Iterable[bytes]) -> Blob:
        """See BlobStore."""
        self._break(key)
        return self.store.put(key, chunks)

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """See BlobStore."""
        self._break(key)
        return self.store.read(key, start=start, end=end)

    def delete(self, key: str) -> None:
        """See BlobStore."""
        self.store.delete(key)

    def list(self, prefix: str) -> Iterator[StoredBlob]:
        """See BlobStore."""
        return self.store.list(prefix)

    def discard_unfinished(self, older_than_seconds: float) -> int:
        """See BlobStore."""
        return self.store.discard_unfinished(older_than_seconds)

    def _break(self, key: str) -> None:
        if self.is_sick(key):
            raise ConnectionError("the store's host has gone")

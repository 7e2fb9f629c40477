"""Blobs in an object store, through obstore.

Credentials come from where the platform keeps them (AWS_* variables, instance role), and obstore finds them itself.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import obstore
from obstore.store import ObjectStore, from_url

from app.core.storage.blobs.store import CHUNK_BYTES, Blob, BlobExists, BlobMissing, StoredBlob, check_key


@dataclass(frozen=True)
class ObjectBlobs:
    """Blobs as objects; the store makes a finished upload visible all at once."""

    store: ObjectStore

    def put(self, key: str, chunks: Iterable[bytes]) -> Blob:
        """See BlobStore. Keys hold random ids or fences, so the check before the write only catches mistakes."""
        check_key(key)
        if self._exists(key):
            raise BlobExists(key)
        digest, size_bytes = hashlib.sha256(), 0

        def counted() -> Iterator[bytes]:
            nonlocal size_bytes
            for chunk in chunks:
                digest.update(chunk)
                size_bytes += len(chunk)
                yield chunk

        obstore.put(self.store, key, counted())
        return Blob(key, size_bytes, digest.hexdigest())

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """See BlobStore."""
        check_key(key)
        try:
            size_bytes = obstore.head(self.store, key)["size"]
        except FileNotFoundError as error:
            raise BlobMissing(key) from error
        stop = size_bytes if end is None else min(end, size_bytes)
        if start >= stop:
            return iter(())
        found = obstore.get(self.store, key, options={"range": (start, stop)})
        return (bytes(chunk) for chunk in found.stream(min_chunk_size=CHUNK_BYTES))

    def delete(self, key: str) -> None:
        """See BlobStore."""
        check_key(key)
        if self._exists(key):
            obstore.delete(self.store, key)

    def list(self, prefix: str) -> Iterator[StoredBlob]:
        """See BlobStore. Object stores list whole path segments only, so the rest of the prefix is matched here."""
        now = time.time()
        for found in obstore.list(self.store, prefix.rpartition("/")[0] or None):
            for entry in found:
                if entry["path"].startswith(prefix):
                    yield StoredBlob(entry["path"], entry["size"], now - entry["last_modified"].timestamp())

    def discard_unfinished(self, older_than_seconds: float) -> int:  # noqa: ARG002
        """See BlobStore. An unfinished upload is no object; a bucket's life-cycle rule ends it."""
        return 0

    def _exists(self, key: str) -> bool:
        try:
            obstore.head(self.store, key)
        except FileNotFoundError:
            return False
        return True


def open_s3(url: str) -> ObjectBlobs:
    """The store behind s3://bucket/prefix; region, endpoint and credentials come from AWS_* variables."""
    return ObjectBlobs(from_url(url))

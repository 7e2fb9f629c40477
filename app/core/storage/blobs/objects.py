"""Blobs in an object store, through obstore.

Credentials come from where the platform keeps them (AWS_* variables, instance role), and obstore finds them itself.
Every trouble of the store is told here, once, as one of ours: full, gone, or down.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING

import obstore
import structlog
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import ObjectStore, from_url

from app.core.errors import ImmunotuneError
from app.core.storage.blobs.store import (
    CHUNK_BYTES,
    Blob,
    BlobExists,
    BlobMissing,
    SourceFailed,
    StoredBlob,
    check_key,
    from_source,
    storage_full,
    store_down,
)

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# what one request moves: small enough for the timeout on a slow line, and for many at once in memory
_READ_BYTES = 2 * 2**20
_PART_BYTES = 5 * 2**20  # S3 takes no smaller parts
_PARTS_AT_ONCE = 2
_CLAIMS = "claims"
# a claim on a key outlives its upload only where the process was killed
_CLAIM_SECONDS = 86_400.0
# how long a handler or a courier waits for a store that is down: for one answer, and for all tries together
_WAIT_SECONDS = 15.0
_FULL_WORDS = ("status code: 507", "InsufficientStorage", "QuotaExceeded", "StorageFull")


@dataclass(frozen=True)
class ObjectBlobs:
    """Blobs as objects; the store makes a finished upload visible all at once."""

    store: ObjectStore

    def put(self, key: str, chunks: Iterable[bytes]) -> Blob:
        """See BlobStore. Created only where it is absent, by the store itself; what takes several requests claims its
        key first."""
        check_key(key)
        digest, size_bytes = hashlib.sha256(), 0

        def counted() -> Iterator[bytes]:
            nonlocal size_bytes
            for chunk in from_source(chunks):
                digest.update(chunk)
                size_bytes += len(chunk)
                yield chunk

        with _told(key):
            source = counted()
            first = _up_to(source, _PART_BYTES)
            if len(first) < _PART_BYTES:
                obstore.put(self.store, key, first, mode="create")
            else:
                self._put_parts(key, chain([first], source))
        return Blob(key, size_bytes, digest.hexdigest())

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """See BlobStore."""
        check_key(key)
        with _told(key):
            size_bytes = obstore.head(self.store, key)["size"]
        return self._parts(key, start, size_bytes if end is None else min(end, size_bytes))

    def delete(self, key: str) -> None:
        """See BlobStore."""
        check_key(key)
        with suppress(BlobMissing), _told(key):
            obstore.delete(self.store, key)

    def list(self, prefix: str) -> Iterator[StoredBlob]:
        """See BlobStore. Object stores list whole path segments only, so the rest of the prefix is matched here."""
        now = time.time()
        with _told(prefix):
            for found in obstore.list(self.store, prefix.rpartition("/")[0] or None):
                for entry in found:
                    if entry["path"].startswith(prefix):
                        yield StoredBlob(entry["path"], entry["size"], now - entry["last_modified"].timestamp())

    def discard_unfinished(self, older_than_seconds: float) -> int:
        """See BlobStore. An unfinished upload is no object: a bucket's life-cycle rule ends it; its claim ends here."""
        old = max(older_than_seconds, _CLAIM_SECONDS)
        left = [claim.key for claim in self.list(f"{_CLAIMS}/") if claim.age_seconds >= old]
        for key in left:
            with suppress(BlobMissing), _told(key):
                obstore.delete(self.store, key)
        return len(left)

    def _put_parts(self, key: str, chunks: Iterator[bytes]) -> None:
        # a store creates-if-absent in one request only, so an object of its own holds the key meanwhile
        claim = f"{_CLAIMS}/{key}"
        obstore.put(self.store, claim, b"", mode="create")
        try:
            with suppress(NotFoundError, FileNotFoundError):
                obstore.head(self.store, key)
                raise BlobExists(key)
            obstore.put(
                self.store,
                key,
                chunks,
                use_multipart=True,
                chunk_size=_PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )
        finally:
            with suppress(BaseError, OSError):
                obstore.delete(self.store, claim)

    def _parts(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        while start < stop:
            end = min(start + _READ_BYTES, stop)
            with _told(key):
                part = bytes(obstore.get_range(self.store, key, start=start, end=end))
            if len(part) != end - start:
                _log.error("store.trouble", reason="a short answer")
                raise store_down()
            for at in range(0, len(part), CHUNK_BYTES):
                yield part[at : at + CHUNK_BYTES]
            start = end


def open_s3(url: str, *, wait_seconds: float = _WAIT_SECONDS) -> ObjectBlobs:
    """The store behind s3://bucket/prefix; region, endpoint and credentials come from AWS_* variables.

    A store that says nothing for `wait_seconds` is down; whatever may be tried again is for about as long.
    """
    wait = timedelta(seconds=wait_seconds)
    client: ClientConfig = {
        "connect_timeout": min(wait, timedelta(seconds=3)),
        "read_timeout": wait,
        "timeout": 4 * wait,  # of one request, which moves a few MiB at most
    }
    if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("true", "1", "yes", "on"):
        client["allow_http"] = True  # options of our own make obstore overlook this variable
    retry: RetryConfig = {
        "max_retries": 3,
        "retry_timeout": wait,
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2},
    }
    return ObjectBlobs(from_url(url, client_options=client, retry_config=retry))


@contextmanager
def _told(key: str) -> Iterator[None]:
    """Tell the store's errors as BlobMissing, BlobExists, StorageFull or StoreDown; a source's stay what they are."""
    try:
        yield
    except SourceFailed as failed:
        raise failed.__cause__ or failed from None
    except (BlobExists, BlobMissing, ImmunotuneError):
        raise
    except (NotFoundError, FileNotFoundError) as error:
        raise BlobMissing(key) from error
    except (AlreadyExistsError, FileExistsError) as error:
        raise BlobExists(key) from error
    except (BaseError, OSError) as error:
        said = str(error)
        if any(word in said for word in _FULL_WORDS):
            raise storage_full() from error
        _log.error("store.trouble", reason=type(error).__name__, said=said[:300])
        raise store_down() from error


def _up_to(chunks: Iterator[bytes], size_bytes: int) -> bytes:
    """The chunks joined, until there are at least so many bytes or no more."""
    found = bytearray()
    for chunk in chunks:
        found += chunk
        if len(found) >= size_bytes:
            break
    return bytes(found)

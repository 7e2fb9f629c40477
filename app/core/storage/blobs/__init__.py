"""Stored bytes: the store that the settings name, and the names that its users need."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from app.core.settings import Settings
from app.core.storage.blobs.folder import FolderBlobs
from app.core.storage.blobs.store import (
    Blob,
    BlobExists,
    BlobMissing,
    BlobStore,
    CorruptBlob,
    StoredBlob,
    check_key,
    fetch_file,
    put_bytes,
    put_file,
    read_bytes,
    read_range,
)

__all__ = [
    "Blob",
    "BlobExists",
    "BlobMissing",
    "BlobStore",
    "CorruptBlob",
    "StoredBlob",
    "check_key",
    "fetch_file",
    "open_blobs",
    "put_bytes",
    "put_file",
    "read_bytes",
    "read_range",
]


def open_blobs(settings: Settings) -> BlobStore:
    """The store behind `settings.blob_url`: file:///folder or s3://bucket/prefix. Raises ValueError on others."""
    url = urlsplit(settings.blob_url)
    match url.scheme:
        case "file":
            root = Path(unquote(url.path))
            root.mkdir(parents=True, exist_ok=True)
            return FolderBlobs(root, settings.limits.free_bytes)
        case "s3":
            # only hosts with S3 load the object-store library
            from app.core.storage.blobs.objects import open_s3

            return open_s3(settings.blob_url)
        case _:
            raise ValueError(f"IMMUNOTUNE_BLOB_URL must begin with file:/// or s3://, not {url.scheme!r}.")

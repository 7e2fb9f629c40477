import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.errors import StorageFull
from app.core.settings import Settings
from app.core.storage.blobs import (
    Blob,
    BlobExists,
    BlobMissing,
    BlobStore,
    CorruptBlob,
    check_key,
    fetch_file,
    open_blobs,
    put_bytes,
    put_file,
    read_bytes,
)
from app.core.storage.blobs.folder import FolderBlobs

BIG = bytes(range(256)) * 12_000  # three chunks


def test_what_was_put_comes_back_with_its_digest(blobs: BlobStore) -> None:
    blob = blobs.put("files/proj/one", iter([BIG[:70_000], BIG[70_000:]]))
    assert blob == Blob("files/proj/one", len(BIG), hashlib.sha256(BIG).hexdigest())
    assert read_bytes(blobs, blob.key) == BIG


@pytest.mark.parametrize(("start", "end"), [(0, 10), (5, None), (2**20 - 1, 2**20 + 1), (7, 7), (0, 10**9)])
def test_a_range_is_the_slice(blobs: BlobStore, start: int, end: int | None) -> None:
    put_bytes(blobs, "a/b", BIG)
    assert b"".join(blobs.read("a/b", start=start, end=end)) == BIG[start:end]


def test_an_empty_blob_is_a_blob(blobs: BlobStore) -> None:
    assert put_bytes(blobs, "a/empty", b"").size_bytes == 0
    assert read_bytes(blobs, "a/empty") == b""


def test_a_key_is_never_overwritten(blobs: BlobStore) -> None:
    put_bytes(blobs, "a/b", b"first")
    with pytest.raises(BlobExists):
        put_bytes(blobs, "a/b", b"second")
    assert read_bytes(blobs, "a/b") == b"first"


def test_an_upload_that_breaks_off_leaves_nothing(blobs: BlobStore) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        blobs.put("a/b", broken())
    assert list(blobs.list("")) == []
    put_bytes(blobs, "a/b", b"whole")


def test_a_missing_key_is_known_before_the_first_chunk(blobs: BlobStore) -> None:
    with pytest.raises(BlobMissing):
        blobs.read("a/nothing")


def test_deleting_twice_is_fine(blobs: BlobStore) -> None:
    put_bytes(blobs, "a/b", b"x")
    blobs.delete("a/b")
    blobs.delete("a/b")
    with pytest.raises(BlobMissing):
        blobs.read("a/b")


def test_a_listing_holds_exactly_the_keys_of_its_prefix(blobs: BlobStore) -> None:
    for key in ("jobs/a/1/x", "jobs/a/10/y", "jobs/ab/1/z", "files/f"):
        put_bytes(blobs, key, b"12345")
    assert {blob.key for blob in blobs.list("jobs/a/1/")} == {"jobs/a/1/x"}
    assert {blob.key for blob in blobs.list("jobs/a")} == {"jobs/a/1/x", "jobs/a/10/y", "jobs/ab/1/z"}
    (found,) = blobs.list("files/")
    assert found.size_bytes == 5
    assert -5 < found.age_seconds < 60


def test_fetching_verifies_the_bytes(blobs: BlobStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(BIG)
    blob = put_file(blobs, "a/b", source)
    fetch_file(blobs, blob, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == BIG
    with pytest.raises(CorruptBlob):
        fetch_file(blobs, Blob(blob.key, blob.size_bytes, "0" * 64), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_full_disk_refuses_and_keeps_nothing(tmp_path: Path) -> None:
    full = FolderBlobs(tmp_path, free_bytes=2**62)
    with pytest.raises(StorageFull):
        put_bytes(full, "a/b", b"x")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/.incoming", "a b", "a\n", "a" * 600])
def test_a_key_cannot_leave_the_store(blobs: BlobStore, key: str) -> None:
    with pytest.raises(ValueError, match="not a blob key"):
        put_bytes(blobs, key, b"x")


@given(st.text(max_size=40))
def test_whatever_key_is_allowed_stays_below_the_root(key: str) -> None:
    try:
        check_key(key)
    except ValueError:
        return
    assert Path("/root", key).resolve().is_relative_to("/root")


def test_the_store_follows_the_setting(tmp_path: Path) -> None:
    assert isinstance(open_blobs(Settings(data=tmp_path)), FolderBlobs)
    assert not isinstance(open_blobs(Settings(data=tmp_path, blob_url="s3://bucket/prefix")), FolderBlobs)
    with pytest.raises(ValueError, match="IMMUNOTUNE_BLOB_URL"):
        open_blobs(Settings(data=tmp_path, blob_url="ftp://host/x"))

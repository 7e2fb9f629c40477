"""A blob store that is full, down, slow, or breaks off: one error of ours each, however the store says it."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from app.core.errors import StorageFull, StoreDown
from app.core.storage.blobs import BlobExists, BlobMissing, BlobStore, put_bytes, read_bytes
from app.core.storage.blobs.folder import FolderBlobs
from app.core.storage.blobs.objects import ObjectBlobs, open_s3

BIG = bytes(range(256)) * 2**15  # 8 MiB: more than one request takes
_BODIES = {
    "unavailable": (503, b"<Error><Code>SlowDown</Code></Error>"),
    "forbidden": (403, b"<Error><Code>AccessDenied</Code></Error>"),
    "full": (507, b"<Error><Code>InsufficientStorage</Code></Error>"),
    "quota": (403, b"<Error><Code>QuotaExceeded</Code></Error>"),
}


@contextmanager
def s3_in_trouble(trouble: str) -> Iterator[str]:
    """An address where every request meets this trouble; `half` answers a HEAD well and breaks off each body."""
    ending = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if trouble == "hang":
                ending.wait(30)
                return
            status, body = (
                (206 if self.headers.get("Range") else 200, b"x" * 10) if trouble == "half" else _BODIES[trouble]
            )
            self.send_response(status)
            self.send_header("Content-Length", "1000" if trouble == "half" else str(len(body)))
            self.send_header("Content-Range", "bytes 0-999/1000")
            self.send_header("Last-Modified", "Mon, 30 Nov 2026 08:00:00 GMT")
            self.send_header("ETag", '"tag"')
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
                self.close_connection = True

    for method in ("GET", "PUT", "HEAD", "DELETE", "POST"):
        setattr(Handler, f"do_{method}", Handler._answer)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        ending.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectBlobs]:
    """The S3 store of the service over a server with the trouble that the test names."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with s3_in_trouble(request.param if request.param != "gone" else "full") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url if request.param != "gone" else "http://127.0.0.1:9")
        for name, value in (
            ("ALLOW_HTTP", "true"),
            ("REGION", "x"),
            ("ACCESS_KEY_ID", "k"),
            ("SECRET_ACCESS_KEY", "s"),
        ):
            monkeypatch.setenv(f"AWS_{name}", value)
        yield open_s3("s3://bucket/prefix", wait_seconds=1.0)


CALLS: dict[str, Callable[[BlobStore], object]] = {
    "put": lambda store: put_bytes(store, "a/b", b"x"),
    "put in parts": lambda store: put_bytes(store, "a/b", BIG),
    "read": lambda store: read_bytes(store, "a/b"),
    "delete": lambda store: store.delete("a/b"),
    "list": lambda store: list(store.list("a/")),
}


@pytest.mark.parametrize("s3", ["unavailable", "forbidden", "gone"], indirect=True)
@pytest.mark.parametrize("call", CALLS)
def test_a_store_that_is_down_is_one_error(s3: ObjectBlobs, call: str) -> None:
    """S27: 503, a refusal and a closed port are StoreDown from every call, with a mend and no word of the store's."""
    with pytest.raises(StoreDown) as down:
        CALLS[call](s3)
    assert (down.value.status, down.value.code) == (503, "storage_unavailable")
    assert down.value.retry_after is not None
    assert "bucket" not in down.value.message


@pytest.mark.parametrize("s3", ["hang"], indirect=True)
@pytest.mark.parametrize("call", ["put", "read"])
def test_a_store_that_hangs_is_waited_for_with_a_limit(s3: ObjectBlobs, call: str) -> None:
    """S27: timeouts and retries are set, so nobody waits for minutes."""
    began = time.monotonic()
    with pytest.raises(StoreDown):
        CALLS[call](s3)
    assert 0.9 < time.monotonic() - began < 15


@pytest.mark.parametrize("s3", ["half"], indirect=True)
def test_half_a_body_is_never_a_whole_one(s3: ObjectBlobs) -> None:
    """S27: a download that breaks off is the store's trouble, not the end of the file."""
    with pytest.raises(StoreDown):
        read_bytes(s3, "a/b")


@pytest.mark.parametrize("s3", ["full", "quota"], indirect=True)
@pytest.mark.parametrize("call", ["put", "put in parts"])
def test_a_full_object_store_is_full(s3: ObjectBlobs, call: str) -> None:
    """S27: a store without room is StorageFull, as a full disk is."""
    with pytest.raises(StorageFull):
        CALLS[call](s3)


@pytest.mark.parametrize("size", [10, len(BIG)], ids=["small", "parts"])
def test_of_two_puts_at_once_one_wins(blobs: BlobStore, size: int) -> None:
    """S27: a key that is taken between look and write is not overwritten."""

    def overtaken() -> Iterator[bytes]:
        yield BIG[: size // 2]
        put_bytes(blobs, "a/b", b"first")
        yield BIG[size // 2 : size]

    with pytest.raises(BlobExists):
        blobs.put("a/b", overtaken())
    assert read_bytes(blobs, "a/b") == b"first"
    assert [blob.key for blob in blobs.list("")] == ["a/b"]


def test_two_puts_in_parts_do_not_meet() -> None:
    """S27: while one put of many requests is under way, another of the same key is refused."""
    store = ObjectBlobs(MemoryStore())
    refused: list[BaseException] = []

    def overtaken() -> Iterator[bytes]:
        yield BIG[: 6 * 2**20]
        other = threading.Thread(target=put_again)
        other.start()
        other.join(20)
        yield BIG[6 * 2**20 :]

    def put_again() -> None:
        try:
            put_bytes(store, "a/b", BIG)
        except BlobExists as error:
            refused.append(error)

    store.put("a/b", overtaken())
    assert len(refused) == 1
    assert read_bytes(store, "a/b") == BIG


def test_a_broken_folder_is_down_and_not_empty(tmp_path: Path) -> None:
    """S27: a file system in trouble is StoreDown, and a missing blob stays a missing blob."""
    root = tmp_path / "blobs"
    store = FolderBlobs(root)
    put_bytes(store, "a/b", b"x")
    with pytest.raises(BlobMissing):
        store.read("a/c")
    with pytest.raises(BlobMissing):
        store.read("a/b/c")
    root.rename(tmp_path / "away")
    root.write_text("no folder")
    for call in ("put", "read", "delete"):
        with pytest.raises(StoreDown):
            CALLS[call](store)

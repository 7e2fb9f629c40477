"""Pulling adapters: checked by digest, unpacked to two files, the least used ones evicted."""

import hashlib
import json
import os
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.core.models import PUBLIC_BASE
from app.core.storage.blobs import put_bytes
from app.core.storage.blobs.folder import FolderBlobs
from finetuning.model.digest import BaseFiles
from tests.support.tiny_llama import served_name
from worker.archive import pack
from worker.serving.adapter_cache import AdapterCache, BadAdapter, UnknownAdapter


def zipped(folder: Path, weights: bytes = b"weights", **more: bytes) -> bytes:
    """An artifact as an attempt publishes it."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        files = {"adapter_config.json": b"{}", "adapter_model.safetensors": weights} | more
        for name, data in files.items():
            (Path(made) / name).write_bytes(data)
        return pack(Path(made), sorted(files), folder / "made.zip").read_bytes()


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    (tmp_path / "blobs").mkdir()
    return FolderBlobs(tmp_path / "blobs")


@pytest.fixture
def cache(blobs: FolderBlobs, tmp_path: Path) -> AdapterCache:
    return AdapterCache(blobs, tmp_path / "cache")


def test_a_pull_leaves_what_peft_reads_and_what_says_the_base(
    cache: AdapterCache, blobs: FolderBlobs, tmp_path: Path
) -> None:
    data = zipped(tmp_path, **{"parity.json": b"{}"})
    put_bytes(blobs, "jobs/j/1/result/adapter_stock.zip", data)
    name = served_name("jobs/j/1/result/adapter_stock.zip", data)
    found = cache.pull(name)
    assert found is not None
    named = sorted(path.name for path in found.folder.iterdir())
    assert named == ["adapter_config.json", "adapter_model.safetensors", "parity.json"]
    blobs.delete("jobs/j/1/result/adapter_stock.zip")
    assert cache.pull(name) == found


def test_the_public_base_needs_no_adapter(cache: AdapterCache) -> None:
    assert cache.pull(PUBLIC_BASE) is None


@pytest.mark.parametrize("name", ["", "gpt-4o", "../../etc/passwd@" + "0" * 64 + ":1", "a/b@" + "0" * 63 + ":1"])
def test_other_names_are_unknown(cache: AdapterCache, name: str) -> None:
    with pytest.raises(UnknownAdapter):
        cache.pull(name)


def test_an_absent_blob_is_unknown(cache: AdapterCache) -> None:
    with pytest.raises(UnknownAdapter):
        cache.pull(served_name("jobs/j/1/gone.zip", b""))


def test_other_bytes_than_named_are_refused(cache: AdapterCache, blobs: FolderBlobs, tmp_path: Path) -> None:
    data = zipped(tmp_path)
    put_bytes(blobs, "a.zip", data)
    with pytest.raises(BadAdapter):
        cache.pull(served_name("a.zip", data + b"x"))
    with pytest.raises(BadAdapter):
        cache.pull(served_name("a.zip", b"y" * len(data)))


def test_what_is_no_adapter_zip_is_refused(cache: AdapterCache, blobs: FolderBlobs, tmp_path: Path) -> None:
    put_bytes(blobs, "text.zip", b"no zip")
    with pytest.raises(BadAdapter):
        cache.pull(served_name("text.zip", b"no zip"))
    with zipfile.ZipFile(tmp_path / "half.zip", "w") as archive:
        archive.writestr("adapter_config.json", b"{}")
    half = (tmp_path / "half.zip").read_bytes()
    put_bytes(blobs, "half.zip", half)
    with pytest.raises(BadAdapter):
        cache.pull(served_name("half.zip", half))
    assert not any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", ["../evil.json", "evil.py", "adapter_config.json"])
def test_an_artifact_that_no_attempt_makes_is_refused_whole(
    cache: AdapterCache, blobs: FolderBlobs, tmp_path: Path, name: str
) -> None:
    (tmp_path / "evil.zip").write_bytes(zipped(tmp_path))
    with zipfile.ZipFile(tmp_path / "evil.zip", "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns about a name that occurs twice
        archive.writestr(name, b"{}")
    data = (tmp_path / "evil.zip").read_bytes()
    put_bytes(blobs, "evil.zip", data)
    with pytest.raises(BadAdapter):
        cache.pull(served_name("evil.zip", data))
    assert not any((tmp_path / "cache").iterdir())
    assert not list(tmp_path.rglob("evil.json")) + list(tmp_path.rglob("evil.py"))


def test_of_two_servers_that_share_a_folder_one_pulls(cache: AdapterCache, blobs: FolderBlobs, tmp_path: Path) -> None:
    data = zipped(tmp_path)
    put_bytes(blobs, "a.zip", data)
    other = AdapterCache(blobs, tmp_path / "cache")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda each: each.pull(served_name("a.zip", data)), [cache, other])
    assert first == second
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [hashlib.sha256(data).hexdigest()]


class _HeldUp(FolderBlobs):
    """A store that gives nothing of one blob until it is let go."""

    def __init__(self, folder: Path, slow: str) -> None:
        super().__init__(folder)
        self.asked, self.let_go = threading.Event(), threading.Event()
        self._slow = slow

    def read(self, key: str, **bounds: int) -> Iterator[bytes]:
        if key == self._slow:
            self.asked.set()
            assert self.let_go.wait(60)
        return super().read(key, **bounds)


def test_a_slow_download_holds_up_nobody_else(blobs: FolderBlobs, tmp_path: Path) -> None:
    """S15: one lock was held during a download of up to 2 GiB."""
    names = []
    for key in ("slow.zip", "quick.zip"):
        data = zipped(tmp_path, key.encode())
        put_bytes(blobs, key, data)
        names.append(served_name(key, data))
    store = _HeldUp(tmp_path / "blobs", "slow.zip")
    cache = AdapterCache(store, tmp_path / "cache")
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(cache.pull, names[0])
        try:
            assert store.asked.wait(60)
            assert pool.submit(cache.pull, names[1]).result(timeout=30) is not None
            assert not slow.done()
        finally:
            store.let_go.set()
        assert slow.result(timeout=30) is not None


def test_the_least_used_adapter_makes_room(blobs: FolderBlobs, tmp_path: Path) -> None:
    cache = AdapterCache(blobs, tmp_path / "cache", limit_bytes=2500)
    names: list[str] = []
    for index in range(3):
        data = zipped(tmp_path, bytes([index]) * 1000)
        put_bytes(blobs, f"{index}.zip", data)
        names.append(served_name(f"{index}.zip", data))
    kept, dropped = cache.pull(names[0]), cache.pull(names[1])
    assert kept is not None
    assert dropped is not None
    os.utime(kept.folder, (2e9, 2e9))
    os.utime(dropped.folder, (1e9, 1e9))
    newest = cache.pull(names[2])
    assert newest is not None
    assert (kept.folder.is_dir(), dropped.folder.is_dir(), newest.folder.is_dir()) == (True, False, True)


@pytest.mark.parametrize("name", ["alignment.json", "parity.json"])
def test_an_adapter_of_another_base_is_refused_also_from_the_disk(
    name: str, blobs: FolderBlobs, tmp_path: Path
) -> None:
    """The base may change while the cached adapters stay; an earlier release's adapter says nothing of its base."""
    base, other = BaseFiles("a" * 64, "b" * 64), BaseFiles("c" * 64, "d" * 64)
    bound = zipped(tmp_path, **{name: json.dumps(base.told()).encode()})
    old = zipped(tmp_path, weights=b"old", **{name: b"{}"})
    for key, data in (("bound.zip", bound), ("old.zip", old)):
        put_bytes(blobs, key, data)
    assert AdapterCache(blobs, tmp_path / "cache", base=base).pull(served_name("bound.zip", bound)) is not None
    changed = AdapterCache(blobs, tmp_path / "cache", base=other)
    with pytest.raises(BadAdapter, match=r"bound\.zip: the adapter was made over other files of its base"):
        changed.pull(served_name("bound.zip", bound))
    assert changed.pull(served_name("old.zip", old)) is not None

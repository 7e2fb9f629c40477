"""Pulling adapters: checked by digest, unpacked to two files, the least used ones evicted."""

import os
import zipfile
from pathlib import Path

import pytest

from app.core.models import PUBLIC_BASE
from app.core.storage.blobs import put_bytes
from app.core.storage.blobs.folder import FolderBlobs
from tests.support.tiny_llama import wire_name
from worker.serving.adapter_cache import AdapterCache, BadAdapter, UnknownAdapter


def zipped(folder: Path, weights: bytes = b"weights", **more: bytes) -> bytes:
    target = folder / "made.zip"
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("adapter_config.json", b"{}")
        archive.writestr("adapter_model.safetensors", weights)
        for name, data in more.items():
            archive.writestr(name, data)
    return target.read_bytes()


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    (tmp_path / "blobs").mkdir()
    return FolderBlobs(tmp_path / "blobs")


@pytest.fixture
def cache(blobs: FolderBlobs, tmp_path: Path) -> AdapterCache:
    return AdapterCache(blobs, tmp_path / "cache")


def test_a_pull_leaves_the_two_files_that_peft_reads(cache: AdapterCache, blobs: FolderBlobs, tmp_path: Path) -> None:
    data = zipped(tmp_path, **{"../evil.py": b"x", "manifest.json": b"{}"})
    put_bytes(blobs, "jobs/j/1/result/adapter_stock.zip", data)
    name = wire_name("jobs/j/1/result/adapter_stock.zip", data)
    found = cache.pull(name)
    assert found is not None
    assert sorted(path.name for path in found.folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not list(tmp_path.rglob("evil.py"))
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
        cache.pull(wire_name("jobs/j/1/gone.zip", b""))


def test_other_bytes_than_named_are_refused(cache: AdapterCache, blobs: FolderBlobs, tmp_path: Path) -> None:
    data = zipped(tmp_path)
    put_bytes(blobs, "a.zip", data)
    with pytest.raises(BadAdapter):
        cache.pull(wire_name("a.zip", data + b"x"))
    with pytest.raises(BadAdapter):
        cache.pull(wire_name("a.zip", b"y" * len(data)))


def test_what_is_no_adapter_zip_is_refused(cache: AdapterCache, blobs: FolderBlobs, tmp_path: Path) -> None:
    put_bytes(blobs, "text.zip", b"no zip")
    with pytest.raises(BadAdapter):
        cache.pull(wire_name("text.zip", b"no zip"))
    with zipfile.ZipFile(tmp_path / "half.zip", "w") as archive:
        archive.writestr("adapter_config.json", b"{}")
    half = (tmp_path / "half.zip").read_bytes()
    put_bytes(blobs, "half.zip", half)
    with pytest.raises(BadAdapter):
        cache.pull(wire_name("half.zip", half))
    assert not any((tmp_path / "cache").iterdir())


def test_the_least_used_adapter_makes_room(blobs: FolderBlobs, tmp_path: Path) -> None:
    cache = AdapterCache(blobs, tmp_path / "cache", limit_bytes=2500)
    names: list[str] = []
    for index in range(3):
        data = zipped(tmp_path, bytes([index]) * 1000)
        put_bytes(blobs, f"{index}.zip", data)
        names.append(wire_name(f"{index}.zip", data))
    kept, dropped = cache.pull(names[0]), cache.pull(names[1])
    assert kept is not None
    assert dropped is not None
    os.utime(kept.folder, (2e9, 2e9))
    os.utime(dropped.folder, (1e9, 1e9))
    newest = cache.pull(names[2])
    assert newest is not None
    assert (kept.folder.is_dir(), dropped.folder.is_dir(), newest.folder.is_dir()) == (True, False, True)

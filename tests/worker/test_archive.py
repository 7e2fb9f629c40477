"""Facts about downloads: the same bytes every time, flat, stored, checked against their manifest."""

import copy
import hashlib
import json
import os
import shutil
import stat
import zipfile
from pathlib import Path

import pytest

from worker.archive import BadArchive, is_full_disk, pack, unpack


@pytest.fixture
def result(tmp_path: Path) -> Path:
    root = tmp_path / "result"
    (root / "adapter").mkdir(parents=True)
    (root / "adapter" / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 5000)
    (root / "adapter" / "adapter_config.json").write_text('{"r": 8}', encoding="utf-8")
    (root / "recipe.json").write_text("{}", encoding="utf-8")
    return root


ABOUT = {"form": "adapter", "base_required": "tiny-aligned", "versions": {"peft": "0.21.2"}}


def test_packing_twice_gives_the_same_bytes(result: Path, tmp_path: Path) -> None:
    first = pack(result, ("adapter", "recipe.json"), tmp_path / "a.zip", about=ABOUT).read_bytes()
    for path in result.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    second = pack(result, ("recipe.json", "adapter"), tmp_path / "b.zip", about=ABOUT).read_bytes()
    assert first == second


def test_members_are_sorted_stored_flat_and_without_times(result: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(pack(result, ("recipe.json", "adapter"), tmp_path / "a.zip")) as archive:
        infos = archive.infolist()
        assert archive.testzip() is None
    names = [info.filename for info in infos]
    assert names == ["manifest.json", "adapter_config.json", "adapter_model.safetensors", "recipe.json"]
    assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
    assert {stat.S_IFMT(info.external_attr >> 16) for info in infos} == {stat.S_IFREG}


def test_the_manifest_tells_form_base_versions_sizes_and_hashes(result: Path, tmp_path: Path) -> None:
    (result / "adapter" / "manifest.json").write_text('{"max_lora_rank": 16, "form": "?"}', encoding="utf-8")
    with zipfile.ZipFile(pack(result, ("adapter",), tmp_path / "a.zip", about=ABOUT)) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        for file in manifest["files"]:
            data = archive.read(file["name"])
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    assert {name: manifest[name] for name in ABOUT} == ABOUT
    assert manifest["max_lora_rank"] == 16
    assert len(manifest["files"]) == 2


def test_what_was_packed_comes_back(result: Path, tmp_path: Path) -> None:
    unpack(pack(result, ("adapter",), tmp_path / "a.zip"), tmp_path / "out")
    packed, back = result / "adapter", tmp_path / "out"
    assert sorted(path.name for path in back.iterdir()) == sorted(
        [*(p.name for p in packed.iterdir()), "manifest.json"]
    )
    for path in packed.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes()


def test_a_link_is_not_followed(result: Path, tmp_path: Path) -> None:
    (result / "adapter" / "more.json").symlink_to(result / "recipe.json")
    with pytest.raises(BadArchive, match="plain file"):
        pack(result, ("adapter",), tmp_path / "a.zip")


@pytest.mark.parametrize("name", ["weights.bin", "weights.pt", "loop.pkl", "code.py"])
def test_only_known_kinds_of_files_are_shipped(result: Path, tmp_path: Path, name: str) -> None:
    (result / "adapter" / name).write_bytes(b"x")
    with pytest.raises(BadArchive, match="never shipped"):
        pack(result, ("adapter",), tmp_path / "a.zip")


def test_two_files_of_one_name_are_refused(result: Path, tmp_path: Path) -> None:
    (result / "adapter" / "recipe.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BadArchive, match="one name"):
        pack(result, ("adapter", "recipe.json"), tmp_path / "a.zip")


def manifest_of(*files: tuple[str, bytes]) -> bytes:
    """A manifest that is right about these files."""
    listed = [{"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files]
    return json.dumps({"files": listed}).encode()


def assert_refused(tmp_path: Path, match: str) -> None:
    with pytest.raises(BadArchive, match=match):
        unpack(tmp_path / "a.zip", tmp_path / "out" / "in")
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir() and path.name != "a.zip"]


@pytest.mark.parametrize("name", ["../up.json", "/top.json", "a/b.json", "a\\b.json", "..", "in/", "C:/x.json"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("manifest.json", manifest_of((name, b"{}")))
        archive.writestr(name, "{}")
    assert_refused(tmp_path, "not a plain file name")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO])
def test_a_member_that_is_no_plain_file_is_refused(tmp_path: Path, kind: int) -> None:
    info = zipfile.ZipInfo("link.json")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("manifest.json", manifest_of(("link.json", b"/etc/passwd")))
        archive.writestr(info, "/etc/passwd")
    assert_refused(tmp_path, "not a plain file name")


def test_a_member_of_a_kind_that_is_never_shipped_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("manifest.json", manifest_of(("code.py", b"x")))
        archive.writestr("code.py", b"x")
    assert_refused(tmp_path, "never shipped")


def test_a_compressed_member_is_refused(tmp_path: Path) -> None:
    zeros = bytes(2**20)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", manifest_of(("bomb.json", zeros)))
        archive.writestr("bomb.json", zeros)
    assert_refused(tmp_path, "compressed")


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    zeros = bytes(2**16)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.json", zeros)
        for name in ("b.json", "c.json"):
            again = copy.copy(archive.getinfo("a.json"))
            again.filename = again.orig_filename = name
            archive.filelist.append(again)
            archive.NameToInfo[name] = again
        archive.writestr("manifest.json", manifest_of(*((f"{name}.json", zeros) for name in "abc")))
    assert_refused(tmp_path, "larger than the archive")


def test_too_many_members_are_refused(tmp_path: Path) -> None:
    names = [f"{i}.json" for i in range(1001)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("manifest.json", manifest_of(*((name, b"") for name in names)))
        for name in names:
            archive.writestr(name, b"")
    assert_refused(tmp_path, "1002 files")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("manifest.json", manifest_of(("a.json", b"{}")))
        archive.writestr("a.json", b"{}")
        archive.writestr("a.json", b"[]")
    assert_refused(tmp_path, "one name")


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("manifest.json", manifest_of(("a.json", b"{}")))
        archive.writestr("a.json", b"{}")
        archive.getinfo("a.json").flag_bits |= 1
    assert_refused(tmp_path, "encrypted")


@pytest.mark.parametrize(
    "manifest",
    [b"", b"[]", b"{}", b'{"files": {}}', b'{"files": [1]}', b'{"files": [{}]}', b'{"files": []}', b"[" * 100_000],
)
def test_a_manifest_that_does_not_list_what_is_there_is_refused(tmp_path: Path, manifest: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("manifest.json", manifest)
        archive.writestr("a.json", b"{}")
    assert_refused(tmp_path, "manifest")


def test_an_archive_without_a_manifest_or_with_a_huge_one_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.json", b"{}")
    assert_refused(tmp_path, "manifest.json cannot be read")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("manifest.json", b" " * 2**20 + manifest_of())
    assert_refused(tmp_path, "larger than 1048576")


@pytest.mark.parametrize("cut", range(0, 400, 7))
def test_broken_bytes_are_refused_whole(result: Path, tmp_path: Path, cut: int) -> None:
    """Whatever zipfile raises over them, the caller sees one error, and no file."""
    (result / "adapter" / "adapter_model.safetensors").write_bytes(b"short")
    whole = pack(result, ("adapter",), tmp_path / "whole.zip").read_bytes()
    (tmp_path / "whole.zip").unlink()
    shutil.rmtree(result)
    at = len(whole) - 1 - cut
    (tmp_path / "a.zip").write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    try:
        unpack(tmp_path / "a.zip", tmp_path / "out" / "in")
    except BadArchive:
        assert not any((tmp_path / "out" / "in").iterdir())
    else:  # a byte that says nothing, such as a version
        assert (tmp_path / "out" / "in" / "adapter_model.safetensors").read_bytes() == b"short"


def test_changed_bytes_leave_nothing_behind(result: Path, tmp_path: Path) -> None:
    path = pack(result, ("adapter",), tmp_path / "a.zip")
    (result / "adapter" / "adapter_config.json").write_text('{"r": 9}', encoding="utf-8")
    manifest = zipfile.ZipFile(path).read("manifest.json")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", manifest)
        for file in (result / "adapter").iterdir():
            archive.write(file, file.name)
    with pytest.raises(BadArchive, match="does not match"):
        unpack(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"PK\x05\x06", b"no zip at all"])
def test_what_is_no_zip_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(BadArchive):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_absent_parts_are_left_out(result: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(pack(result, ("reports", "recipe.json"), tmp_path / "a.zip")) as archive:
        assert archive.namelist() == ["manifest.json", "recipe.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_is_no_fault_of_an_archive() -> None:
    with pytest.raises(OSError, match="No space left") as full, Path("/dev/full").open("wb", buffering=0) as device:
        device.write(b"x")
    assert is_full_disk(full.value)


def test_other_trouble_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as absent:
        (tmp_path / "absent").read_bytes()
    assert not is_full_disk(absent.value)
    assert not is_full_disk(BadArchive("full"))

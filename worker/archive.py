"""Downloads as zip files that are the same bytes every time: sorted names, stored, fixed times, no folders, no links.

Unpacking takes nothing else: whatever `pack` would not have made is refused before anything of it is used.
"""

import hashlib
import json
import shutil
import stat
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import cast

MANIFEST = "manifest.json"
_CHUNK_BYTES = 2**20
_BEGINNING = (1980, 1, 1, 0, 0, 0)  # the oldest time a zip can hold
_MODE = (stat.S_IFREG | 0o644) << 16
_UNIX = 3
_ENCRYPTED = 0x1  # a bit of a member's flags
_MOST_FILES = 1000
_MOST_MANIFEST_BYTES = 2**20
_PACKABLE = frozenset({".json", ".safetensors", ".csv", ".jinja", ".txt", ".md"})


class BadArchive(ValueError):
    """An archive, or what should go into one, is not what this module makes; the message says how."""


@dataclass(frozen=True)
class _Entry:
    name: str
    size_bytes: int
    sha256: str
    source: Path

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, "bytes": self.size_bytes, "sha256": self.sha256}


def pack(root: Path, parts: Sequence[str], target: Path, *, about: Mapping[str, object] | None = None) -> Path:
    """Write `target` from files and folders below `root`, and return it.

    The archive begins with a manifest: `about` (form, base_required, versions), over what a manifest.json among the
    files already says, and each file's size in bytes and sha256. Two calls on equal files give equal bytes.
    Raises BadArchive on a link, a name that occurs twice, or a kind of file that is never shipped.
    """
    files = sorted(_files(root, parts), key=lambda path: path.name)
    entries = [_entry(path) for path in files if path.name != MANIFEST]
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        raise BadArchive(f"two files of one name in {', '.join(parts)}; an archive has no folders")
    said = [_object(path) for path in files if path.name == MANIFEST]
    manifest = {**(said[0] if said else {}), **(about or {}), "files": [entry.to_json() for entry in entries]}
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(_info(MANIFEST), text + "\n")
        for entry in entries:
            _store(archive, entry)
    return target


def unpack(packed: Path, folder: Path) -> None:
    """Extract an archive that `pack` made into `folder` and verify every file against the manifest.

    The files together are never larger than the archive. Raises BadArchive, OSError when the disk is full; nothing is
    left in `folder` then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    try:
        with zipfile.ZipFile(packed) as archive:
            _check_members(archive.infolist(), packed.stat().st_size)
            for info in archive.infolist():
                path = folder / info.filename
                with archive.open(info) as source, path.open("xb") as copy:
                    written.append(path)
                    shutil.copyfileobj(source, copy, _CHUNK_BYTES)
        _verify(folder, {path.name for path in written} - {MANIFEST})
    # whatever zipfile raises on bytes that are no sound zip, from its lengths to its names
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError) as wrong:
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(wrong, BadArchive) or is_full_disk(wrong):
            raise
        raise BadArchive(f"not a sound archive: {wrong}") from wrong


def is_full_disk(error: Exception) -> bool:
    """Whether this says that no room is left to write to, which is no fault of an archive."""
    return isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT)


def _files(root: Path, parts: Iterable[str]) -> list[Path]:
    found: list[Path] = []
    for part in parts:
        path = root / part
        found += path.rglob("*") if path.is_dir() else [path] if path.exists() else []
    files = [path for path in found if path.is_symlink() or not path.is_dir()]
    for path in files:
        if path.is_symlink() or not path.is_file():
            raise BadArchive(f"{path.name} is not a plain file")
        if path.suffix not in _PACKABLE:
            raise BadArchive(f"{path.name}: files ending in '{path.suffix}' are never shipped")
    return files


def _entry(path: Path) -> _Entry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _Entry(path.name, path.stat().st_size, digest, path)


def _info(name: str, size_bytes: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _BEGINNING)
    info.compress_type, info.create_system, info.external_attr = zipfile.ZIP_STORED, _UNIX, _MODE
    info.file_size = size_bytes  # decides on ZIP64 before the bytes are written
    return info


def _store(archive: zipfile.ZipFile, entry: _Entry) -> None:
    digest = hashlib.sha256()
    with entry.source.open("rb") as source, archive.open(_info(entry.name, entry.size_bytes), "w") as member:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            member.write(chunk)
    if digest.hexdigest() != entry.sha256:
        raise BadArchive(f"{entry.name} changed while it was packed")


def _check_members(infos: Sequence[zipfile.ZipInfo], archive_bytes: int) -> None:
    """Refuse, before a byte is written, what could write elsewhere, twice, or more than the archive's own size."""
    for info in infos:
        _check_member(info)
    if len(infos) > _MOST_FILES:
        raise BadArchive(f"it holds {len(infos)} files, more than {_MOST_FILES}")
    if len({info.filename for info in infos}) != len(infos):
        raise BadArchive("two files have one name")
    # nothing is compressed, so more than this means that members share their bytes
    if sum(info.file_size for info in infos) > archive_bytes:
        raise BadArchive("its files are larger than the archive")


def _check_member(info: zipfile.ZipInfo) -> None:
    name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
    if Path(name).name != name or "\\" in name or name in ("", ".", "..") or kind not in (0, stat.S_IFREG):
        raise BadArchive(f"{name[:80]!r} is not a plain file name")
    if Path(name).suffix not in _PACKABLE:
        raise BadArchive(f"{name[:80]!r}: files of this kind are never shipped")
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
        raise BadArchive(f"{name[:80]!r} is compressed or encrypted")
    if name == MANIFEST and info.file_size > _MOST_MANIFEST_BYTES:
        raise BadArchive(f"the manifest is larger than {_MOST_MANIFEST_BYTES} bytes")


def _verify(folder: Path, names: set[str]) -> None:
    found = [_entry(folder / name).to_json() for name in sorted(names)]
    if _object(folder / MANIFEST).get("files") != found:
        raise BadArchive("what the archive holds does not match the manifest")


def _object(path: Path) -> dict[str, object]:
    try:
        value = cast(object, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as wrong:
        raise BadArchive(f"{path.name} cannot be read") from wrong
    if not isinstance(value, dict):
        raise BadArchive(f"{path.name} must be a JSON object")
    return cast(dict[str, object], value)

"""What a power cut may not take: commits and blobs that were answered for."""

import os
from pathlib import Path

import pytest
from sqlalchemy import text

from app.core.settings import Settings
from app.core.storage.blobs import put_bytes
from app.core.storage.blobs.folder import FolderBlobs
from app.core.storage.database import migrate, open_database


def test_sqlite_syncs_its_log_at_every_commit(tmp_path: Path) -> None:
    """S31: with synchronous=NORMAL the last commits, and so jobs that a client has the id of, are lost."""
    settings = Settings(data=tmp_path)
    migrate(settings)
    database = open_database(settings)
    with database.writing() as session:
        assert session.execute(text("PRAGMA synchronous")).scalar_one() == 2  # FULL
    database.close()


def test_every_folder_that_a_blob_needed_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S31: a new folder is an entry of its parent; unless that is synced too, the blob's whole path can be gone."""
    synced: list[str] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    root = tmp_path / "blobs"
    root.mkdir()
    store = FolderBlobs(root)
    put_bytes(store, "jobs/a/1/result/x.zip", b"x")
    assert {str(root / below) for below in ("jobs/a/1/result", "jobs/a/1", "jobs/a", "jobs")} | {str(root)} <= set(
        synced
    )
    synced.clear()
    put_bytes(store, "jobs/a/1/result/y.zip", b"y")
    assert str(root / "jobs/a/1/result") in synced
    assert str(root / "jobs/a/1") not in synced

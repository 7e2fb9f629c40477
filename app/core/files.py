"""File rows: add, check result, read, list, hide.

Knows who may see a file and when it may go; must not know how rows are parsed or bytes are stored.
"""

from typing import Literal

from sqlalchemy.orm import Session

from app.core.blobs import Blob
from app.core.broker import Wake
from app.core.db import JsonObject, Listing, Page
from app.core.settings import Limits
from app.core.tables import File, FilePurpose, FileStatus


def clean_filename(name: str) -> str:
    """The base name without control and direction marks, 255 characters at most; only for showing.

    Raises InvalidRequest `invalid_filename` when nothing is left.
    """
    raise NotImplementedError


def blob_key(project_id: str, file_id: str) -> str:
    """Where an uploaded file's bytes lie."""
    return f"files/{project_id}/{file_id}"


def add_file(
    session: Session,
    project_id: str,
    file_id: str,
    blob: Blob,
    *,
    filename: str,
    limits: Limits,
    expires_after_seconds: float | None = None,
) -> File:
    """Add an uploaded fine-tune file (`uploaded`); after the commit wake with `wake_for(file)`.

    `file_id` comes from ids.new_id(Prefix.FILE), since the blob was stored under it before.
    Raises QuotaExceeded `storage_quota_exceeded`.
    """
    raise NotImplementedError


def wake_for(file: File) -> Wake:
    """The wake-up that gets an added file checked."""
    raise NotImplementedError


def get_file(session: Session, project_id: str, file_id: str) -> File:
    """One visible file of this project. Raises NotFound."""
    raise NotImplementedError


def find_unchecked(session: Session, file_id: str) -> File | None:
    """The file if it still waits for its check (for the checks pool, which serves every project)."""
    raise NotImplementedError


def list_files(session: Session, project_id: str, page: Page, *, purpose: FilePurpose | None = None) -> Listing[File]:
    """Visible files of this project. Raises InvalidRequest `invalid_cursor`."""
    raise NotImplementedError


def set_validation(
    session: Session,
    file_id: str,
    status: Literal[FileStatus.PROCESSED, FileStatus.ERROR],
    *,
    validation: JsonObject,
    details: str | None = None,
) -> tuple[Wake, ...]:
    """End a file's check; a second end changes nothing. Returns the waiting jobs' wake-ups, to send after the commit."""
    raise NotImplementedError


def delete_file(session: Session, project_id: str, file_id: str) -> File:
    """Hide a file now; its bytes are swept later.

    Raises NotFound (also on a repeat), InvalidRequest `file_in_use` while a live job reads it or a model needs it.
    """
    raise NotImplementedError

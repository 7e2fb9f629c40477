"""File rows: add, read, list, hide; who may see a file and when it may go."""

import json
import re
import unicodedata
from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from app.core.errors import InvalidRequest, QuotaExceeded, not_found
from app.core.settings import LimitSettings
from app.core.storage.blobs import Blob
from app.core.storage.database import JsonObject, Listing, Page, change, db_now, fetch_page, read_clock
from app.core.storage.job_states import LIVE
from app.core.storage.tables import Artifact, BaseRow, File, FilePurpose, FileStatus, Job, Model, Project

SHOWN = File.deleted_at.is_(None)
_AT_ONCE = 100
_DETAILS_CHARS = 512


@dataclass(frozen=True)
class NewFile:
    """An upload as it was received: its stored bytes, and what the scan of its rows found.

    `id` comes from ids.new_id(Prefix.FILE), since the bytes were stored under it before.
    """

    id: str
    blob: Blob
    filename: str
    status: FileStatus
    validation: JsonObject
    status_details: str | None = None
    expires_after_seconds: float | None = None
    report: str | None = None


def clean_filename(name: str) -> str:
    """The base name without control and direction marks, 255 characters at most; only for showing.

    Raises InvalidRequest `invalid_filename` when nothing is left.
    """
    base = re.split(r"[/\\]", name)[-1]
    # categories C* hold control, format (direction marks among them), surrogate and unassigned characters
    shown = "".join(character for character in base if not unicodedata.category(character).startswith("C")).strip()
    if shown in ("", ".", ".."):
        raise InvalidRequest(
            "The file has no usable name. Send one such as train.jsonl.", code="invalid_filename", param="file"
        )
    return shown[:255]


def blob_key(project_id: str, file_id: str) -> str:
    """Where an uploaded file's bytes lie."""
    return f"files/{project_id}/{file_id}"


def add_file(session: Session, project_id: str, new: NewFile, *, limits: LimitSettings) -> File:
    """Add an uploaded fine-tune file; its rows were checked. Raises QuotaExceeded `storage_quota_exceeded`."""
    # uploads that end together are counted one after the other
    session.execute(select(Project.seq).where(Project.id == project_id).with_for_update(key_share=True))
    stored = select(func.coalesce(func.sum(File.size_bytes), 0)).where(File.project_id == project_id, SHOWN)
    if session.scalars(stored).one() + new.blob.size_bytes > limits.project_bytes:
        raise QuotaExceeded(
            f"The project may store {limits.project_bytes} bytes in all. Delete files that you no longer need.",
            code="storage_quota_exceeded",
        )
    file = File(
        id=new.id,
        project_id=project_id,
        filename=clean_filename(new.filename),
        purpose=FilePurpose.FINE_TUNE,
        status=new.status,
        status_details=new.status_details and new.status_details[:_DETAILS_CHARS],
        blob_key=new.blob.key,
        sha256=new.blob.sha256,
        size_bytes=new.blob.size_bytes,
        validation=new.validation,
        report=new.report,
        expires_at=new.expires_after_seconds and read_clock(session) + new.expires_after_seconds,
    )
    session.add(file)
    session.flush()
    return file


def blob_of(file: File) -> Blob:
    """Where a file's bytes lie and what they must hash to."""
    return Blob(file.blob_key, file.size_bytes, file.sha256)


def get_file(session: Session, project_id: str, file_id: str) -> File:
    """One visible file of this project. Raises NotFound."""
    file = session.scalars(select(File).where(File.id == file_id, File.project_id == project_id, SHOWN)).one_or_none()
    if file is None:
        raise not_found("file", file_id)
    return file


def read_report(session: Session, project_id: str, file_id: str) -> str:
    """All that the check of a visible file found, as JSON text. Raises NotFound."""
    file = get_file(session, project_id, file_id)
    whole = session.scalars(select(File.report).where(File.id == file.id)).one()
    return whole or json.dumps(file.validation or {})  # files of before the whole was kept, and files of jobs


def list_files(session: Session, project_id: str, page: Page, *, purpose: FilePurpose | None = None) -> Listing[File]:
    """Visible files of this project. Raises InvalidRequest `invalid_cursor`."""
    shown = (SHOWN,) if purpose is None else (SHOWN, File.purpose == purpose)
    return fetch_page(session, select(File).where(File.project_id == project_id), File, page, *shown)


def delete_file(session: Session, project_id: str, file_id: str) -> File:
    """Hide a file now; its bytes are swept later.

    Raises NotFound (also on a repeat), InvalidRequest `file_in_use` while a live job reads it or a model needs it.
    """
    lock_file(session, project_id, file_id)
    file = get_file(session, project_id, file_id)
    if session.scalars(select(_in_use(file.id))).one():
        raise InvalidRequest(
            "The file is in use. Cancel the job that reads it or delete the model that needs it, then try again.",
            code="file_in_use",
            param="file_id",
        )
    file.deleted_at, file.report = read_clock(session), None
    session.flush()
    return file


def lock_file(session: Session, project_id: str, file_id: str) -> None:
    """Make jobs that begin to read this file and its deletion take turns."""
    session.execute(select(File.seq).where(File.id == file_id, File.project_id == project_id).with_for_update())


def hide_expired(session: Session) -> int:
    """Hide files whose time is up and that nothing uses, some at a time; how many."""
    due = SHOWN, File.expires_at <= db_now(), ~_in_use(File.id)
    # a job that is just being created holds its file (`lock_file`): such a file is left for the next time
    free = select(File.id).where(*due).order_by(File.seq).limit(_AT_ONCE).with_for_update(skip_locked=True)
    found = session.scalars(free).all()
    # asked again in a statement of its own, which sees the jobs that were committed before the locks were had
    return change(session, update(File).where(File.id.in_(found), *due).values(deleted_at=db_now(), report=None))


def _in_use(file_id: str | InstrumentedAttribute[str]) -> ColumnElement[bool]:
    reads = or_(Job.training_file == file_id, Job.validation_file == file_id)
    read = select(Job.id).where(Job.state.in_(LIVE), reads)
    of_model = select(Model.id).join(Artifact, Artifact.id == Model.artifact_id)
    served = of_model.where(Model.deleted_at.is_(None), Artifact.file_id == file_id)
    of_base = select(BaseRow.id).where(BaseRow.alignment_file == file_id)
    return or_(read.exists(), served.exists(), of_base.exists())

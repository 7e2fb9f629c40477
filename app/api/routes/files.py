"""Routes of /v1/files."""

import base64
import hashlib
from functools import partial

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from app.api.http.auth import FilesReader, FilesWriter, require_scope
from app.api.http.downloads import Download, send_blob, send_bytes
from app.api.http.idempotency import replay, taken_up
from app.api.http.paging import long_page, one_value, order_query, page, page_query
from app.api.http.path_params import FileId
from app.api.http.resources import Resources, ResourcesDep
from app.api.http.uploads import Upload, receive_upload
from app.api.schemas.files import deletion_to_body, file_to_body, file_to_item
from app.core import files, idempotency
from app.core.errors import ImmunotuneError, InvalidRequest
from app.core.files import NewFile
from app.core.ids import Prefix, new_id
from app.core.jobs import jobs
from app.core.projects import Caller
from app.core.storage.blobs import read_bytes
from app.core.storage.database import Listing, Page
from app.core.storage.tables import File, FilePurpose, FileStatus, Form
from finetuning.rows.report import SHOWN_ERRORS

router = APIRouter(prefix="/v1/files")


@router.post("")
async def create_file(request: Request, caller: FilesWriter, resources: ResourcesDep) -> Response:
    """Store, hash and scan the file while it arrives, so the reply already says whether it is good."""
    edge = resources.settings.edge
    # a project that has all its places leaves the others': slow clients must not starve anybody else
    async with resources.uploads.hold(caller.project_id, 1, seconds=edge.upload_wait_seconds):
        # uploads have threads of their own: they must not starve the other routes
        receive = partial(_create_file, request, caller, resources)
        return await to_thread.run_sync(receive, limiter=resources.upload_threads)


def _create_file(request: Request, caller: Caller, resources: Resources) -> Response:
    file_id = new_id(Prefix.FILE)
    key = files.blob_key(caller.project_id, file_id)
    upload = receive_upload(request, resources, key)
    try:
        reply, is_new = _add_file(request, caller, resources, _new_file(upload, file_id))
    except ImmunotuneError:  # after any other fault the commit may have happened; the sweep knows
        resources.blobs.delete(key)
        raise
    if not is_new:
        resources.blobs.delete(key)
    return reply


def _add_file(request: Request, caller: Caller, resources: Resources, new: NewFile) -> tuple[Response, bool]:
    meaning = [FilePurpose.FINE_TUNE, new.filename, new.expires_after_seconds, new.blob.sha256]
    with taken_up(request, caller, meaning) as repeat, resources.database.writing() as session:
        stored = idempotency.reserve(session, repeat)
        if stored is not None:
            return replay(stored), False
        file = files.add_file(session, caller.project_id, new, limits=resources.settings.limits)
        body = file_to_body(file)
        idempotency.store(session, repeat, status=200, body=body)
        session.commit()
    return JSONResponse(body), True


def _new_file(upload: Upload, file_id: str) -> NewFile:
    report = upload.report
    return NewFile(
        id=file_id,
        blob=upload.blob,
        filename=upload.filename,
        status=FileStatus.PROCESSED if report.is_valid else FileStatus.ERROR,
        validation=report.to_json(SHOWN_ERRORS),
        report=upload.report_text,
        status_details=report.message or None,
        expires_after_seconds=upload.expires_after_seconds,
    )


@router.get("")
def list_files(request: Request, caller: FilesReader, resources: ResourcesDep) -> Response:
    """The project's files, newest first unless `order=asc`."""
    descending = order_query(request) == "desc"
    asked = page_query(request, Prefix.FILE, default=100, maximum=10_000, descending=descending)
    purpose = one_value(request, "purpose")
    if purpose is not None and purpose not in set(FilePurpose):
        return JSONResponse(page([], has_more=False))
    wanted = None if purpose is None else FilePurpose(purpose)

    def read(part: Page) -> Listing[File]:
        with resources.database.reading() as session:
            return files.list_files(session, caller.project_id, part, purpose=wanted)

    return long_page(asked, read, file_to_item, turn=resources.turn)


@router.get("/{file_id}")
def get_file(file_id: FileId, caller: FilesReader, resources: ResourcesDep) -> Response:
    """One file."""
    with resources.database.reading() as session:
        return JSONResponse(file_to_body(files.get_file(session, caller.project_id, file_id)))


@router.get("/{file_id}/validation")
def get_validation(file_id: FileId, caller: FilesReader, resources: ResourcesDep) -> Response:
    """All that the check of the file found; the file object shows the beginning of it."""
    with resources.database.reading() as session:
        report = files.read_report(session, caller.project_id, file_id)
    return Response(report, media_type="application/json")


@router.delete("/{file_id}")
def delete_file(file_id: FileId, caller: FilesWriter, resources: ResourcesDep) -> Response:
    """Hide the file at once; its bytes are swept later."""
    with resources.database.writing() as session:
        files.delete_file(session, caller.project_id, file_id)
        session.commit()
    return JSONResponse(deletion_to_body("file", file_id))


@router.api_route("/{file_id}/content", methods=["GET", "HEAD"])
def get_content(file_id: FileId, request: Request, caller: FilesReader, resources: ResourcesDep) -> Response:
    """The file's bytes; a results CSV is base64 text, as on OpenAI, unless `?format=csv`."""
    with resources.database.reading() as session:
        file = files.get_file(session, caller.project_id, file_id)
        artifact = jobs.find_artifact_of(session, file)
    if artifact is not None:
        if artifact.form != Form.METRICS:
            require_scope(caller, "artifacts:r")  # the same bytes lie behind the routes of artifacts
        jobs.check_released(artifact)
    form = None if artifact is None else artifact.form
    match form, one_value(request, "format"):
        case Form.METRICS, None:
            data = base64.b64encode(read_bytes(resources.blobs, file.blob_key))
            return send_bytes(request, data, Download(len(data), hashlib.sha256(data).hexdigest(), file.filename))
        case Form.METRICS, "csv":
            return _send(request, resources, file, "text/csv")
        case _, None:
            return _send(request, resources, file, "application/octet-stream" if form is None else "application/zip")
        case _:
            raise InvalidRequest("Only a results CSV has format=csv.", code="invalid_value", param="format")


def _send(request: Request, resources: Resources, file: File, media_type: str) -> Response:
    download = Download(file.size_bytes, file.sha256, file.filename, media_type)
    return send_blob(request, resources.blobs, file.blob_key, download)

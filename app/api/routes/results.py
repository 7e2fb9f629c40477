"""Routes of what a job leaves: artifacts, safety report, row ledger, parity certificate."""

import csv
import io
import re
from collections.abc import Iterator, Sequence

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from app.api.http.auth import ArtifactsReader, SafetyReader
from app.api.http.downloads import Download, send_blob
from app.api.http.paging import one_value, page, page_query
from app.api.http.path_params import JobId
from app.api.http.resources import ResourcesDep
from app.api.schemas.results import (
    OFFERED_FORMS,
    artifact_to_body,
    parity_to_body,
    report_to_body,
    verdict_to_body,
)
from app.core.errors import InvalidRequest, NotFound, not_found
from app.core.jobs import jobs, ledger
from app.core.jobs.ledger import RowQuery
from app.core.storage.tables import Form
from finetuning.contract.report import RowVerdict

router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}")

_VERDICT_ID = re.compile(r"row-[0-9]{1,9}", re.ASCII)
_VERDICTS = ("kept", "downweighted", "excluded")
_CSV_COLUMNS = ("line", "row_sha256", "verdict", "weight", "reasons", "tokens", "trained_tokens", "truncated")


@router.get("/artifacts")
def list_artifacts(job_id: JobId, caller: ArtifactsReader, resources: ResourcesDep) -> Response:
    """The forms that this job's result can be downloaded in."""
    with resources.database.reading() as session:
        job = jobs.get_job(session, caller.project_id, job_id)
        found = jobs.list_artifacts(session, caller.project_id, job_id)
    items = [artifact_to_body(result, job) for result in found if result.artifact.form in OFFERED_FORMS]
    return JSONResponse(page(items, has_more=False))


@router.api_route("/artifacts/{form}", methods=["GET", "HEAD"])
def get_artifact(
    job_id: JobId, form: str, *, request: Request, caller: ArtifactsReader, resources: ResourcesDep
) -> Response:
    """One artifact as a zip."""
    if form not in OFFERED_FORMS:
        raise _no_such_form(form)
    with resources.database.reading() as session:
        file = jobs.get_artifact(session, caller.project_id, job_id, Form(form)).file
    download = Download(file.size_bytes, file.sha256, file.filename, "application/zip")
    return send_blob(request, resources.blobs, file.blob_key, download)


@router.get("/safety")
def get_safety(job_id: JobId, caller: SafetyReader, resources: ResourcesDep) -> Response:
    """The job's safety report; `complete` is false until the job has one."""
    with resources.database.reading() as session:
        return JSONResponse(report_to_body(jobs.get_job(session, caller.project_id, job_id)))


@router.get("/parity")
def get_parity(job_id: JobId, caller: SafetyReader, resources: ResourcesDep) -> Response:
    """The certificate that the download equals the measured model."""
    with resources.database.reading() as session:
        body = parity_to_body(jobs.get_job(session, caller.project_id, job_id))
    if body is None:
        raise NotFound("This job has no parity certificate: only a job whose training ended well gets one.")
    return JSONResponse(body)


@router.get("/rows")
def list_rows(job_id: JobId, request: Request, caller: SafetyReader, resources: ResourcesDep) -> Response:
    """The ledger: a verdict for every row of the training file."""
    asked = page_query(request, _VERDICT_ID, default=100, maximum=1000)
    wants_csv = _choice(request, "format", ("json", "csv"), default="json") == "csv"
    _refuse_preview(request)
    query = RowQuery(
        order="weight" if _choice(request, "order", ("line", "weight"), default="line") == "weight" else "line",
        verdict=_choice(request, "verdict", _VERDICTS, default=None),
        after=None if asked.after is None else int(asked.after.removeprefix("row-")),
        limit=asked.limit,
    )
    with resources.database.reading() as session:
        result = jobs.get_job(session, caller.project_id, job_id).result
    prefix = "" if result is None else str(result["prefix"])
    blobs, turn = resources.blobs, resources.turn
    if wants_csv:
        whole = RowQuery(query.order, query.verdict)
        rows = ledger.read_all(blobs, prefix, whole, turn=turn) if prefix else iter(())
        return StreamingResponse(_csv_lines(rows), media_type="text/csv")
    found, has_more = ledger.read_page(blobs, prefix, query, turn=turn) if prefix else ((), False)
    return JSONResponse(page([verdict_to_body(row) for row in found], has_more=has_more))


def _choice(request: Request, name: str, choices: Sequence[str], *, default: str | None) -> str | None:
    value = one_value(request, name)
    if value is not None and value not in choices:
        raise InvalidRequest(f"{name} must be one of: {', '.join(choices)}.", code="invalid_value", param=name)
    return default if value is None else value


def _refuse_preview(request: Request) -> None:
    if one_value(request, "include") is not None:
        message = "Row text is not shown here; find it in your file by its line number."
        raise InvalidRequest(message, code="unsupported_parameter", param="include")


def _csv_lines(rows: Iterator[RowVerdict]) -> Iterator[str]:
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for row in rows:
        reasons = " ".join(reason.code for reason in row.reasons)
        cells = (row.line, row.row_sha256, row.verdict, row.weight, reasons, row.tokens, row.trained_tokens)
        writer.writerow((*cells, str(row.truncated).lower()))
        if line.tell() > 16_384:
            yield line.getvalue()
            line.seek(0)
            line.truncate()
    yield line.getvalue()


def _no_such_form(form: str) -> Exception:
    if form == "merged":
        message = "Merged weights are not built here. Load 'adapter_stock' on the public base; it is the same model."
        return InvalidRequest(message, code="artifact_form_unavailable", param="form")
    return not_found("artifact form", form if form.isprintable() else "?")

"""Routes of /v1/fine_tuning/jobs."""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from app.api.http.auth import JobsReader, JobsWriter
from app.api.http.downloads import matches_etag, not_modified
from app.api.http.idempotency import replay, taken_up
from app.api.http.json_bodies import body_of
from app.api.http.paging import page, page_query
from app.api.http.path_params import JobId
from app.api.http.resources import ResourcesDep
from app.api.schemas.files import strong_etag
from app.api.schemas.job_create import (
    METADATA_KEY_CHARS,
    METADATA_PAIRS,
    METADATA_VALUE_CHARS,
    CreateJobBody,
    EmptyBody,
    to_create_job,
)
from app.api.schemas.jobs import JobFrame, checkpoint_to_body, event_to_body, job_to_body
from app.core import idempotency
from app.core.errors import InvalidRequest
from app.core.ids import Prefix
from app.core.jobs import ended, jobs
from app.core.storage.database import read_clock
from app.core.storage.job_states import FINAL

router = APIRouter(prefix="/v1/fine_tuning/jobs")

_METADATA_FILTER = re.compile(r"metadata\[(.*)\]", re.DOTALL)


@router.post("")
def create_job(
    request: Request,
    caller: JobsWriter,
    resources: ResourcesDep,
    body: Annotated[CreateJobBody, Depends(body_of(CreateJobBody))],
) -> Response:
    """Accept a request to train: stored and committed first, then a worker is woken."""
    wanted = to_create_job(body)
    meaning = body.model_dump(mode="json")
    with taken_up(request, caller, meaning) as repeat, resources.database.writing() as session:
        stored = idempotency.reserve(session, repeat)
        if stored is not None:
            return replay(stored)
        job = jobs.add_job(session, resources.settings, caller.project, wanted)
        reply = job_to_body(job, JobFrame(caller.org.id))
        idempotency.store(session, repeat, status=200, body=reply)
        wake_up = jobs.wake_for(job)
        session.commit()
    resources.waker.soon(wake_up)
    return JSONResponse(reply)


@router.get("")
def list_jobs(request: Request, caller: JobsReader, resources: ResourcesDep) -> Response:
    """The project's jobs, newest first; `metadata[k]=v` and `metadata=null` filter."""
    asked = page_query(request, Prefix.JOB, default=20, maximum=100)
    pairs, none_only = _metadata_filter(request)
    with resources.database.reading() as session:
        results_of = partial(jobs.list_artifacts, session, caller.project_id)
        found = jobs.list_jobs(session, caller.project_id, asked, metadata=pairs, no_metadata=none_only)
        now = read_clock(session)
        # a live job has no results yet, which saves a query
        results = [results_of(job.id) if job.state in FINAL else () for job in found.rows]
    with resources.turn:
        frames = [JobFrame(caller.org.id, own, now) for own in results]
        items = [job_to_body(job, frame) for job, frame in zip(found.rows, frames, strict=True)]
    return JSONResponse(page(items, has_more=found.has_more))


@router.get("/{job_id}")
def get_job(job_id: JobId, request: Request, caller: JobsReader, resources: ResourcesDep) -> Response:
    """One job; its ETag lets a poll cost 304."""
    with resources.database.reading() as session:
        job = jobs.get_job(session, caller.project_id, job_id)
        results = jobs.list_artifacts(session, caller.project_id, job_id)
        body = job_to_body(job, JobFrame(caller.org.id, results, read_clock(session)))
    etag = strong_etag(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest())
    return not_modified(etag) if matches_etag(request, etag) else JSONResponse(body, headers={"ETag": etag})


@router.post("/{job_id}/cancel")
def cancel_job(
    job_id: JobId,
    *,
    request: Request,
    caller: JobsWriter,
    resources: ResourcesDep,
    _body: Annotated[EmptyBody, Depends(body_of(EmptyBody))],
) -> Response:
    """Cancel at once: the reply already says `cancelled`; a repeat changes nothing."""
    with taken_up(request, caller, {}) as repeat, resources.database.writing() as session:
        stored = idempotency.reserve(session, repeat)
        if stored is not None:
            return replay(stored)
        job, wakes = ended.cancel(session, caller.project_id, job_id)
        body = job_to_body(job, JobFrame(caller.org.id))
        idempotency.store(session, repeat, status=200, body=body)
        session.commit()
    resources.waker.soon(*wakes)
    return JSONResponse(body)


@router.get("/{job_id}/events")
def list_events(job_id: JobId, request: Request, caller: JobsReader, resources: ResourcesDep) -> Response:
    """The job's story, newest first."""
    asked = page_query(request, Prefix.EVENT, default=20, maximum=100)
    with resources.database.reading() as session:
        found = jobs.list_events(session, caller.project_id, job_id, asked)
    return JSONResponse(page([event_to_body(event) for event in found.rows], has_more=found.has_more))


@router.get("/{job_id}/checkpoints")
def list_checkpoints(job_id: JobId, request: Request, caller: JobsReader, resources: ResourcesDep) -> Response:
    """The job's checkpoints, newest first."""
    asked = page_query(request, Prefix.CHECKPOINT, default=10, maximum=100)
    with resources.database.reading() as session:
        found = jobs.list_checkpoints(session, caller.project_id, job_id, asked)
        job = jobs.get_job(session, caller.project_id, job_id)
    name = jobs.model_name(job.base_id, caller.org.slug, job.suffix, job.id)
    return JSONResponse(page([checkpoint_to_body(row, name) for row in found.rows], has_more=found.has_more))


def _metadata_filter(request: Request) -> tuple[Mapping[str, str] | None, bool]:
    pairs: dict[str, str] = {}
    none_only = False
    for name, value in request.query_params.multi_items():
        match = _METADATA_FILTER.fullmatch(name)
        if name == "metadata" and value == "null":
            none_only = True
        elif name == "metadata" or (match and (match[1] in pairs or not _is_metadata(match[1], value))):
            raise _bad_metadata()
        elif match:
            pairs[match[1]] = value
    if (none_only and pairs) or len(pairs) > METADATA_PAIRS:
        raise _bad_metadata()
    return pairs or None, none_only


def _is_metadata(key: str, value: str) -> bool:
    return 1 <= len(key) <= METADATA_KEY_CHARS and len(value) <= METADATA_VALUE_CHARS


def _bad_metadata() -> InvalidRequest:
    return InvalidRequest(
        f"Filter by metadata=null, or by up to {METADATA_PAIRS} different metadata[key]=value pairs, not by both.",
        code="invalid_value",
        param="metadata",
    )

"""How an attempt ends: it finishes, fails, hands its job back, is cancelled or lost; and which job is then woken.

Each end is one conditional UPDATE on the fence first, results after it, all in one transaction. The bytes are stored
before: whoever publishes them writes blobs, this writes their rows.
"""

from dataclasses import asdict, dataclass
from enum import StrEnum

from sqlalchemy import ColumnElement, case, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from app.core.broker import Wake
from app.core.errors import LeaseLost
from app.core.ids import Prefix, new_id
from app.core.jobs import jobs
from app.core.jobs.jobs import JobError, NewEvent, append_events, model_name, move, wake_for
from app.core.jobs.lease import Lease, base_is_ready, fenced
from app.core.settings import LeaseSettings
from app.core.storage.blobs import Blob
from app.core.storage.database import JsonObject, db_now
from app.core.storage.job_states import JobState, after_loss, backoff_seconds
from app.core.storage.tables import (
    WEIGHT_FORMS,
    Artifact,
    BaseRow,
    BaseStatus,
    File,
    FilePurpose,
    FileStatus,
    Form,
    Job,
    Model,
    Org,
    Project,
)
from finetuning.contract.recipe import JobKind

_WAKE_AT_MOST = 100
_ALIGN_FORMS = frozenset({Form.ALIGNMENT})
_TUNE_FORMS = frozenset({Form.METRICS, Form.REPORTS, Form.ADAPTER, Form.ADAPTER_STOCK})


@dataclass(frozen=True)
class PublishedFile:
    """An uploaded result: its form, the name that downloads show, and its bytes."""

    form: Form
    filename: str
    blob: Blob


@dataclass(frozen=True)
class Published:
    """All that an attempt leaves. `summary` is stored as jobs.result and must be small:

    {"safety": SafetyReport JSON, "rows": {rows_total, rows_kept, rows_downweighted, rows_excluded}, "parity": ... }.
    `prefix` is the blob prefix of the result (reports/*.json lie under it as single blobs too).
    """

    prefix: str
    files: tuple[PublishedFile, ...]
    summary: JsonObject
    trained_tokens: int


class ReleaseCause(StrEnum):
    """Why an attempt hands its job back.

    DRAIN: saved, for a worker that stops. FAULT: the training process ended by itself after its work had begun, which
    counts against the job. HOST: the worker could not begin, or the process was killed from outside. UNFIT: the same of
    a worker that has just lost other jobs too, or that says itself what it lacks (a judge, a disk, a device).
    STORAGE: the store or the disk could not be used.
    """

    DRAIN = "drain"
    FAULT = "fault"
    HOST = "host"
    UNFIT = "unfit"
    STORAGE = "storage"


def release(
    session: Session, timings: LeaseSettings, lease: Lease, cause: ReleaseCause, *, message: str
) -> tuple[Wake, ...]:
    """Hand the job back: DRAIN is due at once, anything else rests, longer each time, and is left to other workers.

    FAULT and HOST count (`lose`); UNFIT and STORAGE say nothing about the job and count for nothing. Raises LeaseLost.
    Returns wake-ups for after the commit.
    """
    held = fenced(lease)
    if cause is ReleaseCause.DRAIN:
        job = move(session, lease.job_id, JobState.QUEUED, held, event=NewEvent(message), **_back_in_queue(0.0))
    elif cause in (ReleaseCause.FAULT, ReleaseCause.HOST):
        kind = LossKind.JOB if cause is ReleaseCause.FAULT else LossKind.HOST
        job = lose(session, timings, lease.job_id, held, kind=kind, message=message)
    else:
        job = _rest(session, timings, lease, message)
    if job is None:
        raise LeaseLost(lease.job_id)
    return (wake_for(job),) if cause is ReleaseCause.DRAIN else next_wakes(session, job)


class LossKind(StrEnum):
    """What was lost. Each kind has its own count and ceiling; a new checkpoint sets both counts to 0."""

    JOB = "job"
    HOST = "host"


@dataclass(frozen=True)
class _Ceiling:
    """Which column counts a kind, how high it may go, and the error of a job that goes there."""

    column: InstrumentedAttribute[int]
    highest: int
    error: JobError


def lose(
    session: Session,
    timings: LeaseSettings,
    job_id: str,
    *conditions: ColumnElement[bool],
    kind: LossKind,
    message: str,
    error: JobError | None = None,
) -> Job | None:
    """Count a loss of the running attempt: back to the queue, or failed (with `error`) at the last allowed one.

    Alignments are never ended by hosts: their end would end every job that waits for the base. None: it moved on.
    """
    ceiling = _ceiling(timings, kind)
    running = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.state == JobState.RUNNING, *conditions)
        .values({ceiling.column.key: ceiling.column + 1})
        .returning(ceiling.column, Job.kind)
    ).one_or_none()
    if running is None:
        return None
    losses, job_kind = running
    endless = kind is LossKind.HOST and job_kind == JobKind.ALIGN
    if not endless and after_loss(losses, max_losses=ceiling.highest) is JobState.FAILED:
        return _fail_lost(session, job_id, error or ceiling.error)
    rest = backoff_seconds(losses, first_seconds=timings.backoff_seconds)
    event = NewEvent(message, level="warn", data={"code": f"{kind}_lost"}) if _is_told(losses) else None
    return move(session, job_id, JobState.QUEUED, event=event, **_back_in_queue(rest), **_left_by(timings, rest))


def fail(
    session: Session, lease: Lease, error: JobError, *, published: Published | None = None, quarantine: bool = False
) -> tuple[Wake, ...]:
    """End the job `failed`. Published results stay readable; with `quarantine` weight forms are held back.

    Raises LeaseLost. Returns the project's next wake-up.
    """
    event = NewEvent(error.message, level="error", data={"code": error.code})
    ended = _ended(published) | {"error": asdict(error)}
    held = Job.state == JobState.RUNNING, fenced(lease)  # not after it was handed back
    job = move(session, lease.job_id, JobState.FAILED, *held, event=event, **ended)
    if job is None:
        raise LeaseLost(lease.job_id)
    if published is not None:
        _add_artifacts(session, job, published, quarantine=quarantine)
    return next_wakes(session, job)


def finish(session: Session, lease: Lease, published: Published) -> tuple[Wake, ...]:
    """End the job `succeeded`: files, artifacts and the model row (for align jobs: the base is ready), at once.

    Raises LeaseLost, ValueError when a form is missing. Returns wake-ups: the project's next job, or after an
    alignment every fine-tune that waited for the base.
    """
    aligns = lease.recipe.kind is JobKind.ALIGN
    needed = _ALIGN_FORMS if aligns else _TUNE_FORMS
    missing = needed - {file.form for file in published.files}
    if missing:
        raise ValueError(f"the result lacks {sorted(missing)}")
    name = None if aligns else _model_name(session, lease)
    ended = _ended(published) | {"stage": "done", "fine_tuned_model": name}
    event = NewEvent("The base is aligned" if aligns else f"New fine-tuned model created: {name}")
    job = move(session, lease.job_id, JobState.SUCCEEDED, fenced(lease), event=event, **ended)
    if job is None:
        raise LeaseLost(lease.job_id)
    artifacts = _add_artifacts(session, job, published, quarantine=False)
    if name is None:
        _open_base(session, job, artifacts[Form.ALIGNMENT], published)
        return _waiting_wakes(session, Job.base_id == job.base_id, limit=_WAKE_AT_MOST)
    session.add(
        Model(
            id=name,
            project_id=job.project_id,
            base_id=job.base_id,
            job_id=job.id,
            # what a model server loads on the public base: alignment and task adapter joined by rank
            artifact_id=artifacts[Form.ADAPTER_STOCK].id,
        )
    )
    append_events(session, job.id, [NewEvent("The job has successfully completed")])
    return next_wakes(session, job)


def cancel(session: Session, project_id: str, job_id: str) -> tuple[Job, tuple[Wake, ...]]:
    """`jobs.cancel`, and the wake-up of what the project may run instead, if the job was running.

    Raises NotFound, InvalidRequest `invalid_job_state`.
    """
    ran = session.scalars(select(Job.state).where(Job.id == job_id)).one_or_none() == JobState.RUNNING
    job = jobs.cancel(session, project_id, job_id)
    return job, next_wakes(session, job) if ran else ()


def next_wakes(session: Session, ended: Job) -> tuple[Wake, ...]:
    """The project's next queued job, now that one of its running jobs has ended."""
    return _waiting_wakes(session, Job.project_id == ended.project_id, limit=1)


def _back_in_queue(rest_seconds: float) -> dict[str, object]:
    # not woken yet, so the reaper wakes it as soon as it is due
    woken_at = db_now() if rest_seconds == 0 else None
    return {"run_after": db_now() + rest_seconds, "woken_at": woken_at, "lease_until": None, "worker_id": None}


def _rest(session: Session, timings: LeaseSettings, lease: Lease, message: str) -> Job | None:
    """running -> queued without a loss, for longer each time; the 1st, 2nd, 4th, 8th .. such return has an event."""
    held = Job.id == lease.job_id, Job.state == JobState.RUNNING, fenced(lease)
    counting = update(Job).where(*held).values(rests=Job.rests + 1).returning(Job.rests)
    rests = session.execute(counting).scalar_one_or_none()
    if rests is None:
        return None
    rest = backoff_seconds(rests - 1, first_seconds=timings.rewake_seconds)
    event = NewEvent(message, level="warn") if _is_told(rests) else None
    return move(session, lease.job_id, JobState.QUEUED, event=event, **_back_in_queue(rest), **_left_by(timings, rest))


def _is_told(times: int) -> bool:
    return times & (times - 1) == 0


def _left_by(timings: LeaseSettings, rest_seconds: float) -> dict[str, object]:
    # the values are those before the update, so this is the worker that has it now
    until = db_now() + rest_seconds + timings.ttl_seconds
    return {"avoid_worker": Job.worker_id, "avoid_until": until}


def _ceiling(timings: LeaseSettings, kind: LossKind) -> _Ceiling:
    if kind is LossKind.JOB:
        times = timings.max_losses
        words = f"The training process was lost {times} times without a new checkpoint. Ask the operator."
        return _Ceiling(Job.losses, times, JobError("worker_crashed", words))
    times = timings.max_host_losses
    words = f"{times} times the worker that had the job was lost without a new checkpoint. Ask the operator."
    return _Ceiling(Job.host_losses, times, JobError("hosts_lost", words))


def _fail_lost(session: Session, job_id: str, error: JobError) -> Job | None:
    event = NewEvent(error.message, level="error", data={"code": error.code})
    return move(session, job_id, JobState.FAILED, event=event, **_ended(None), error=asdict(error))


def _ended(published: Published | None) -> dict[str, object]:
    values: dict[str, object] = {"lease_until": None, "finished_at": db_now()}
    if published is not None:
        values["trained_tokens"] = published.trained_tokens
        values["result"] = {"prefix": published.prefix, **published.summary}
    return values


def _add_artifacts(session: Session, job: Job, published: Published, *, quarantine: bool) -> dict[Form, Artifact]:
    files = {
        result.form: File(
            id=new_id(Prefix.FILE),
            project_id=job.project_id,
            filename=result.filename,
            purpose=FilePurpose.RESULTS,
            status=FileStatus.PROCESSED,
            blob_key=result.blob.key,
            sha256=result.blob.sha256,
            size_bytes=result.blob.size_bytes,
        )
        for result in published.files
    }
    session.add_all(files.values())
    session.flush()
    artifacts = {
        form: Artifact(
            id=new_id(Prefix.ARTIFACT),
            job_id=job.id,
            file_id=file.id,
            form=form,
            quarantined=quarantine and form in WEIGHT_FORMS,
        )
        for form, file in files.items()
    }
    session.add_all(artifacts.values())
    session.flush()
    return artifacts


def _model_name(session: Session, lease: Lease) -> str:
    slug, suffix = session.execute(
        select(Org.slug, Job.suffix)
        .join(Project, Project.org_id == Org.id)
        .join(Job, Job.project_id == Project.id)
        .where(Job.id == lease.job_id)
    ).one()
    return model_name(lease.base_id, slug, suffix, lease.job_id)


def _open_base(session: Session, job: Job, alignment: Artifact, published: Published) -> None:
    session.execute(
        update(BaseRow)
        .where(BaseRow.id == job.base_id)
        .values(
            # its alignment is kept also when another base is served by now
            status=case((BaseRow.status == BaseStatus.RETIRED, BaseStatus.RETIRED), else_=BaseStatus.READY),
            alignment_job=job.id,
            alignment_file=alignment.file_id,
            report=published.summary.get("safety"),
        )
    )


def _waiting_wakes(session: Session, which: ColumnElement[bool], *, limit: int) -> tuple[Wake, ...]:
    due = Job.state == JobState.QUEUED, Job.run_after <= db_now(), base_is_ready(), which
    waiting = session.scalars(select(Job).where(*due).order_by(Job.created_at, Job.seq).limit(limit)).all()
    return tuple(wake_for(job) for job in waiting)

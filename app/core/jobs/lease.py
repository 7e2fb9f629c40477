"""The right of one attempt to work on one job: how it is claimed and renewed; and workers' drain marks.

Every write of an attempt is one conditional UPDATE on (id, fence, running) first, in one transaction with what it
stores. Only the database clock stamps or compares a lease. How an attempt ends is in ended.py.
"""

from dataclasses import asdict, dataclass

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from app.core.errors import LeaseLost
from app.core.files import blob_of
from app.core.ids import Prefix, new_id
from app.core.jobs.jobs import NewEvent, append_events, move, recipe_is_known
from app.core.settings import LeaseSettings, Settings
from app.core.storage.blobs import Blob
from app.core.storage.database import JsonObject, change, db_now
from app.core.storage.job_states import JobState
from app.core.storage.tables import (
    BaseRow,
    BaseStatus,
    Checkpoint,
    File,
    Job,
    Project,
    Worker,
)
from finetuning.contract.progress import Stage
from finetuning.contract.recipe import JobKind, Recipe
from finetuning.contract.shelf import from_shelf


@dataclass(frozen=True)
class SavedCheckpoint:
    """Where a complete checkpoint of the first `step` steps lies: a blob prefix without final slash."""

    step: int
    prefix: str
    fingerprint: str
    metrics: JsonObject


@dataclass(frozen=True)
class Lease:
    """One attempt's right, and all that it needs to begin. Files are blobs: key, size, sha256."""

    job_id: str
    project_id: str
    fence: int
    recipe: Recipe
    base_id: str
    base_source: str
    training: Blob | None
    validation: Blob | None
    alignment: Blob | None
    checkpoint: SavedCheckpoint | None

    @property
    def prefix(self) -> str:
        """Where this attempt's blobs go: jobs/<job>/<fence>."""
        return f"jobs/{self.job_id}/{self.fence}"


@dataclass(frozen=True)
class Beat:
    """What to store with a renewal: all that happened since the last one."""

    events: tuple[NewEvent, ...] = ()
    checkpoints: tuple[SavedCheckpoint, ...] = ()
    stage: Stage | None = None
    progress: JsonObject | None = None


@dataclass(frozen=True)
class BeatReply:
    """The answer to a beat; `draining` asks the supervisor to save and release."""

    draining: bool


def claim(session: Session, settings: Settings, job_id: str, worker_id: str) -> Lease | None:
    """Take a queued, due job: fence + 1 and a fresh lease.

    None is normal: somebody has it, it is final, its project runs as many as it may, its base is not ready, or only a
    newer release knows the form of its recipe.
    """
    project_id = select(Job.project_id).where(Job.id == job_id).scalar_subquery()
    session.execute(select(Project.seq).where(Project.id == project_id).with_for_update())
    other = aliased(Job)
    running = select(func.count()).where(other.project_id == Job.project_id, other.state == JobState.RUNNING)
    job = move(
        session,
        job_id,
        JobState.RUNNING,
        Job.run_after <= db_now(),
        base_is_ready(),
        recipe_is_known(),
        running.scalar_subquery() < settings.limits.running_jobs,
        event=NewEvent("Fine-tuning job started"),
        fence=Job.fence + 1,
        worker_id=worker_id,
        lease_until=db_now() + settings.lease.ttl_seconds,
        started_at=func.coalesce(Job.started_at, db_now()),
        saved_at=db_now(),
    )
    return None if job is None else _lease_of(session, job)


def base_is_ready() -> ColumnElement[bool]:
    """Whether the job's base can be used yet; an align job makes it so, but not while another base is served."""
    may_align = and_(Job.kind == JobKind.ALIGN, BaseRow.status != BaseStatus.RETIRED)
    usable = or_(may_align, BaseRow.status == BaseStatus.READY)
    return select(BaseRow.id).where(BaseRow.id == Job.base_id, usable).correlate(Job).exists()


def beat(session: Session, timings: LeaseSettings, lease: Lease, carried: Beat, *, worker_id: str) -> BeatReply:
    """Renew the lease and store what happened; a new checkpoint sets losses to 0. Raises LeaseLost."""
    values: dict[str, object] = {"lease_until": db_now() + timings.ttl_seconds}
    if carried.checkpoints:
        values |= {"losses": 0, "saved_at": db_now()}
    if carried.stage is not None:
        values["stage"] = carried.stage
    if carried.progress is not None:
        values["progress"] = carried.progress
    # the job row comes first: its lock orders this attempt's writes against cancel and the reaper
    running = Job.id == lease.job_id, Job.state == JobState.RUNNING, fenced(lease)
    if change(session, update(Job).where(*running).values(values)) == 0:
        raise LeaseLost(lease.job_id)
    session.add_all(
        Checkpoint(id=new_id(Prefix.CHECKPOINT), job_id=lease.job_id, fence=lease.fence, **asdict(checkpoint))
        for checkpoint in carried.checkpoints
    )
    append_events(session, lease.job_id, carried.events)
    seen = update(Worker).where(Worker.id == worker_id).values(seen_at=db_now()).returning(Worker.draining)
    return BeatReply(draining=session.scalars(seen).one_or_none() or False)


def enrol_worker(session: Session, *, host: str, devices: str) -> str:
    """Note a worker that starts to take jobs; returns its id."""
    worker = Worker(id=new_id(Prefix.WORKER), host=host, devices=devices)
    session.add(worker)
    session.flush()
    return worker.id


def drain_worker(session: Session, worker_id: str) -> None:
    """Ask this worker's supervisor to save and release at its next beat."""
    session.execute(update(Worker).where(Worker.id == worker_id).values(draining=True))


def fenced(lease: Lease) -> ColumnElement[bool]:
    """Whether the job is still on this lease's number."""
    return Job.fence == lease.fence


def _lease_of(session: Session, job: Job) -> Lease:
    base = session.scalars(select(BaseRow).where(BaseRow.id == job.base_id)).one()
    newest = (
        select(Checkpoint).where(Checkpoint.job_id == job.id).order_by(Checkpoint.step.desc(), Checkpoint.seq.desc())
    )
    saved = session.scalars(newest.limit(1)).one_or_none()
    return Lease(
        job_id=job.id,
        project_id=job.project_id,
        fence=job.fence,
        recipe=from_shelf(Recipe, job.recipe),
        base_id=base.id,
        base_source=base.source,
        training=_blob(session, job.training_file),
        validation=_blob(session, job.validation_file),
        alignment=_blob(session, base.alignment_file),
        checkpoint=None
        if saved is None
        else SavedCheckpoint(saved.step, saved.prefix, saved.fingerprint, saved.metrics),
    )


def _blob(session: Session, file_id: str | None) -> Blob | None:
    return None if file_id is None else blob_of(session.scalars(select(File).where(File.id == file_id)).one())

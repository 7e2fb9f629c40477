"""The right of one attempt to work on one job: how it is claimed and renewed; and workers' drain marks.

Every write of an attempt is one conditional UPDATE on (id, fence, running) first, in one transaction with what it
stores. Only the database clock stamps or compares a lease. How an attempt ends is in ended.py.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from uuid import uuid4

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from app.core.broker import Wake
from app.core.errors import LeaseLost
from app.core.files import blob_of
from app.core.ids import Prefix, new_id
from app.core.jobs.jobs import NewEvent, append_events, move, recipe_is_known, wake_for
from app.core.jobs.workers import is_left_to_others
from app.core.settings import LeaseSettings, Settings
from app.core.storage.blobs import Blob
from app.core.storage.database import JsonObject, change, db_now
from app.core.storage.job_states import JobState
from app.core.storage.tables import (
    BaseRow,
    BaseStatus,
    Checkpoint,
    Event,
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
    """Where a complete checkpoint of the first `step` steps lies: a blob prefix without final slash.

    `contents_sha256` is what its list of contents hashes to; None of one that an earlier release saved.
    """

    step: int
    prefix: str
    fingerprint: str
    metrics: JsonObject
    contents_sha256: str | None = None


@dataclass(frozen=True)
class Lease:
    """One attempt's right, and all that it needs to begin. Files are blobs: key, size, sha256.

    The fence counts attempts; `attempt` is this one's own word. A database that was restored from a backup counts a
    number again, and neither rows nor blobs of the attempt that had it first may be taken for the later one's.
    """

    job_id: str
    project_id: str
    fence: int
    attempt: str
    recipe: Recipe
    base_id: str
    base_source: str
    training: Blob | None
    validation: Blob | None
    alignment: Blob | None
    checkpoint: SavedCheckpoint | None

    @property
    def prefix(self) -> str:
        """Where this attempt's blobs go: jobs/<job>/<fence>-<attempt>."""
        return f"jobs/{self.job_id}/{self.fence}-{self.attempt}"


@dataclass(frozen=True)
class Beat:
    """What to store with a renewal: all that happened since the last one.

    `advanced`: the figures are not those of before, so the job lives.
    """

    events: tuple[NewEvent, ...] = ()
    checkpoints: tuple[SavedCheckpoint, ...] = ()
    stage: Stage | None = None
    progress: JsonObject | None = None
    advanced: bool = False


@dataclass(frozen=True)
class BeatReply:
    """The answer to a beat; `draining` asks the supervisor to save and release."""

    draining: bool


def claim(session: Session, settings: Settings, job_id: str, worker_id: str) -> Lease | None:
    """Take a queued, due job: fence + 1 and a fresh lease.

    None is normal: somebody has it, it is final, its project runs as many as it may, its base is not ready, this
    worker has just lost it and others are there, or only a newer release knows the form of its recipe.
    """
    project_id = select(Job.project_id).where(Job.id == job_id).scalar_subquery()
    # what only points at the project passes: a cancel, which holds the job and waited for it, made a deadlock
    session.execute(select(Project.seq).where(Project.id == project_id).with_for_update(key_share=True))
    other = aliased(Job)
    running = select(func.count()).where(other.project_id == Job.project_id, other.state == JobState.RUNNING)
    job = move(
        session,
        job_id,
        JobState.RUNNING,
        Job.run_after <= db_now(),
        base_is_ready(),
        ~is_left_to_others(settings.lease, worker_id),
        recipe_is_known(),
        running.scalar_subquery() < settings.limits.running_jobs,
        event=None,
        fence=Job.fence + 1,
        attempt=uuid4().hex[:12],
        worker_id=worker_id,
        lease_until=db_now() + settings.lease.ttl_seconds,
        started_at=func.coalesce(Job.started_at, db_now()),
        saved_at=db_now(),
        progress_at=db_now(),
    )
    if job is None:
        return None
    if job.host_losses + job.rests == 0:  # or a store that is down for a day would tell this story all day
        append_events(session, job.id, [NewEvent("Fine-tuning job started")])
    return _lease_of(session, job)


def wakes_for_others(session: Session, timings: LeaseSettings, job_id: str, worker_id: str) -> tuple[Wake, ...]:
    """The wake-up to send on of a job that this worker could claim, had it not just lost it; none of other jobs."""
    due = Job.id == job_id, Job.state == JobState.QUEUED, Job.run_after <= db_now(), base_is_ready()
    job = session.scalars(select(Job).where(*due, is_left_to_others(timings, worker_id))).one_or_none()
    return () if job is None else (wake_for(job),)


def base_is_ready() -> ColumnElement[bool]:
    """Whether the job's base can be used yet; an align job makes it so, but not while another base is served."""
    may_align = and_(Job.kind == JobKind.ALIGN, BaseRow.status != BaseStatus.RETIRED)
    usable = or_(may_align, BaseRow.status == BaseStatus.READY)
    return select(BaseRow.id).where(BaseRow.id == Job.base_id, usable).correlate(Job).exists()


def beat(session: Session, timings: LeaseSettings, lease: Lease, carried: Beat, *, worker_id: str) -> BeatReply:
    """Renew the lease and store what happened; a new checkpoint sets losses to 0. Raises LeaseLost.

    The same news may come twice, when an answer to their commit was lost; they are stored once.
    """
    values: dict[str, object] = {"lease_until": db_now() + timings.ttl_seconds}
    if carried.checkpoints:
        values |= {"losses": 0, "host_losses": 0, "rests": 0, "saved_at": db_now()}
    if carried.advanced or carried.checkpoints or carried.stage is not None:
        values["progress_at"] = db_now()
    if carried.stage is not None:
        values["stage"] = carried.stage
    if carried.progress is not None:
        values["progress"] = carried.progress
    # the job row comes first: its lock orders this attempt's writes against cancel and the reaper
    running = Job.id == lease.job_id, Job.state == JobState.RUNNING, fenced(lease)
    if change(session, update(Job).where(*running).values(values)) == 0:
        raise LeaseLost(lease.job_id)
    _store_news(session, lease, carried)
    well: dict[str, object] = {"faults": 0, "resting_until": None} if carried.advanced else {}
    seen = update(Worker).where(Worker.id == worker_id).values(seen_at=db_now(), **well).returning(Worker.draining)
    return BeatReply(draining=session.scalars(seen).one_or_none() or False)


def discard_checkpoint(session: Session, lease: Lease, *, reason: str) -> Lease:
    """Mark the lease's checkpoint as unusable, and tell; returns the lease with the next older one, if there is one.

    No loss: an attempt that cannot read a checkpoint has not failed at the job. Raises LeaseLost.
    """
    rotten = lease.checkpoint
    assert rotten is not None
    # an update that changes nothing, for its lock and its count: only the holder of the fence may condemn
    held = Job.id == lease.job_id, Job.state == JobState.RUNNING, fenced(lease)
    if change(session, update(Job).where(*held).values(fence=Job.fence)) == 0:
        raise LeaseLost(lease.job_id)
    condemned = Checkpoint.job_id == lease.job_id, Checkpoint.prefix == rotten.prefix
    session.execute(update(Checkpoint).where(*condemned).values(unusable_at=db_now()))
    older = _newest_checkpoint(session, lease.job_id)
    way = "starting from the beginning" if older is None else f"going back to the one at step {older.step}"
    message = f"The checkpoint at step {rotten.step} cannot be used ({reason}); {way}"
    data: JsonObject = {"code": "checkpoint_unusable", "step": rotten.step}
    append_events(session, lease.job_id, [NewEvent(message, level="warn", data=data)])
    return replace(lease, checkpoint=older)


def enrol_worker(session: Session, *, host: str, devices: str, queues: Sequence[str] = ()) -> str:
    """Note a worker that starts to take jobs from these queues; returns its id."""
    worker = Worker(id=new_id(Prefix.WORKER), host=host, devices=devices, queues=f",{','.join(queues)},")
    session.add(worker)
    session.flush()
    return worker.id


def drain_worker(session: Session, worker_id: str) -> None:
    """Ask this worker's supervisor to save and release at its next beat."""
    session.execute(update(Worker).where(Worker.id == worker_id).values(draining=True))


def fenced(lease: Lease) -> ColumnElement[bool]:
    """Whether the job is still on this lease's number and word."""
    return and_(Job.fence == lease.fence, Job.attempt == lease.attempt)


def _lease_of(session: Session, job: Job) -> Lease:
    base = session.scalars(select(BaseRow).where(BaseRow.id == job.base_id)).one()
    assert job.attempt is not None
    return Lease(
        job_id=job.id,
        project_id=job.project_id,
        fence=job.fence,
        attempt=job.attempt,
        recipe=from_shelf(Recipe, job.recipe),
        base_id=base.id,
        base_source=base.source,
        training=_blob(session, job.training_file),
        validation=_blob(session, job.validation_file),
        alignment=_blob(session, base.alignment_file),
        checkpoint=_newest_checkpoint(session, job.id),
    )


def _newest_checkpoint(session: Session, job_id: str) -> SavedCheckpoint | None:
    usable = Checkpoint.job_id == job_id, Checkpoint.unusable_at.is_(None)
    newest = select(Checkpoint).where(*usable).order_by(Checkpoint.step.desc(), Checkpoint.seq.desc())
    row = session.scalars(newest.limit(1)).one_or_none()
    if row is None:
        return None
    return SavedCheckpoint(row.step, row.prefix, row.fingerprint, row.metrics, row.contents_sha256)


def _store_news(session: Session, lease: Lease, carried: Beat) -> None:
    # the job row is locked by now, so nobody stores the same between these looks and the inserts
    if carried.checkpoints:
        mine = Checkpoint.job_id == lease.job_id, Checkpoint.fence == lease.fence
        known = set(session.scalars(select(Checkpoint.step).where(*mine)))
        session.add_all(
            Checkpoint(id=new_id(Prefix.CHECKPOINT), job_id=lease.job_id, fence=lease.fence, **asdict(checkpoint))
            for checkpoint in carried.checkpoints
            if checkpoint.step not in known
        )
    if carried.events:
        written = set(session.scalars(select(Event.id).where(Event.id.in_([event.id for event in carried.events]))))
        append_events(session, lease.job_id, [event for event in carried.events if event.id not in written])


def _blob(session: Session, file_id: str | None) -> Blob | None:
    return None if file_id is None else blob_of(session.scalars(select(File).where(File.id == file_id)).one())

"""The reaper: takes back leases that ran out, sends lost wake-ups again, alarms of overdue checks, sweeps blobs.

Every statement is conditional and may run in any number of processes at once, so there is no leader.
"""

import threading
import time
from dataclasses import asdict, dataclass, field

import structlog
from celery import Celery
from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from app.core import files, idempotency
from app.core.broker import CHECK_JOB, CHECKS_QUEUE, DEAD_LETTERS, RUN_JOB, TaskName, Wake, queue_depth, wake
from app.core.jobs.ended import lose
from app.core.jobs.jobs import JobError, NewEvent, fail_baseless, move
from app.core.jobs.lease import base_is_ready
from app.core.settings import LeaseSettings, Settings
from app.core.storage.blobs import BlobStore
from app.core.storage.database import Database, db_now
from app.core.storage.job_states import LIVE, JobState
from app.core.storage.tables import File, Job
from app.core.telemetry import (
    BLOBS_SWEPT,
    CHECKS_OVERDUE,
    JOBS_QUEUED,
    LEASES_EXPIRED,
    LETTERS_DEAD,
    OLDEST_WAIT_SECONDS,
)

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_AT_ONCE = 100


@dataclass
class Reaper:
    """A thread that ticks until stopped; one bad tick is logged and the next one comes."""

    database: Database
    celery: Celery
    blobs: BlobStore
    settings: Settings
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to tick."""
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop after the tick under way; waits for it as long as one database call may take."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self.settings.database_seconds + 1.0)

    def _run(self) -> None:
        swept_at = time.monotonic()
        while not self._stop.wait(self.settings.lease.reaper_tick_seconds):
            try:
                tick(self.database, self.celery, self.blobs, self.settings)
                if time.monotonic() - swept_at >= self.settings.limits.sweep_seconds:
                    swept_at = time.monotonic()
                    sweep(self.database, self.blobs, older_than_seconds=self.settings.limits.orphan_blob_seconds)
            except Exception:
                log.exception("reaper.tick_failed")


def tick(database: Database, celery: Celery, blobs: BlobStore, settings: Settings) -> None:
    """One round of everything but the sweep."""
    with database.writing() as session:
        wakes = expire(session, settings.lease)
        note_overdue_checks(session, settings.limits.check_seconds)
        fail_baseless(session)
        files.hide_expired(session)
        idempotency.forget_old(session)
        session.commit()
    wake(celery, *wakes)
    rewake(database, celery, settings)
    erase_deleted(database, blobs)


def expire(session: Session, timings: LeaseSettings) -> tuple[Wake, ...]:
    """Take running jobs back whose lease ran out, and end those that saved nothing for too long."""
    running = Job.state == JobState.RUNNING
    stalled = running, Job.saved_at < db_now() - timings.stall_seconds
    for job_id in session.scalars(select(Job.id).where(*stalled).limit(_AT_ONCE)).all():
        hours = timings.stall_seconds / 3600
        error = JobError("job_stalled", f"The job saved no checkpoint for {hours:g} hours. Ask the operator.")
        ended = {"fence": Job.fence + 1, "lease_until": None, "finished_at": db_now(), "error": asdict(error)}
        move(session, job_id, JobState.FAILED, *stalled, event=NewEvent(error.message, level="error"), **ended)
    wakes: list[Wake] = []
    over = running, Job.lease_until < db_now()
    for job_id in session.scalars(select(Job.id).where(*over).limit(_AT_ONCE)).all():
        event = NewEvent("The worker was lost; the job goes on from its last checkpoint", "warn", data=_CRASHED)
        job = lose(session, timings, job_id, *over, event=event, rests=False)
        if job is not None:
            LEASES_EXPIRED.inc()
            log.warning("lease.expired", job_id=job_id, fence=job.fence, losses=job.losses)
            if job.state == JobState.QUEUED:
                wakes.append(Wake(RUN_JOB, job.id, job.queue))
    return tuple(wakes)


def note_overdue_checks(session: Session, check_seconds: float) -> None:
    """Alarm the operator of jobs that no worker has checked in time: they wait, for it is no fault of theirs."""
    late = Job.state == JobState.VALIDATING, Job.created_at < db_now() - check_seconds
    count = session.scalars(select(func.count()).select_from(Job).where(*late)).one()
    CHECKS_OVERDUE.set(count)
    if count:
        advice = "start a worker of the queue checks, or see why its log says job.check_waits"
        log.error("checks.overdue", jobs=count, seconds=check_seconds, advice=advice)


def rewake(database: Database, celery: Celery, settings: Settings) -> None:
    """Wake what waits, is due and was not woken lately, but never past one message per waiting row of a queue.

    Without that bound a stopped pool would find thousands of duplicates when it comes back.
    """
    LETTERS_DEAD.set(queue_depth(celery, DEAD_LETTERS) or 0)
    for queue, waits in _waits(database).items():
        depth = queue_depth(celery, queue)
        if depth is None:
            continue
        with database.writing() as session:
            wakes: list[Wake] = []
            room = sum(waiting.count(session) for waiting in waits) - depth
            for waiting in waits:
                wakes += waiting.mark(session, queue, room - len(wakes), settings.lease.rewake_seconds)
            session.commit()
        wake(celery, *wakes)


def erase_deleted(database: Database, blobs: BlobStore) -> None:
    """Delete the bytes of hidden files; the rows stay as cursors."""
    with database.reading() as session:
        hidden = File.deleted_at.is_not(None), File.erased_at.is_(None)
        due = session.execute(select(File.id, File.blob_key).where(*hidden).limit(_AT_ONCE)).all()
    for file_id, key in due:
        blobs.delete(key)
        with database.writing() as session:
            session.execute(update(File).where(File.id == file_id).values(erased_at=db_now()))
            session.commit()


def sweep(database: Database, blobs: BlobStore, *, older_than_seconds: float) -> int:
    """Delete blobs without a row that needs them: cut-off uploads, lost attempts, checkpoints of ended jobs.

    Those of a cancelled job go whatever their age. Returns how many were deleted.
    """
    swept = blobs.discard_unfinished(older_than_seconds)
    hurried: dict[str, bool] = {}
    for prefix in ("files/", "jobs/"):
        for blob in blobs.list(prefix):
            job_id = blob.key.split("/")[1] if prefix == "jobs/" else ""
            with database.reading() as session:
                if job_id not in hurried:
                    hurried[job_id] = _is_cancelled(session, job_id)
                if blob.age_seconds < older_than_seconds and not hurried[job_id]:
                    continue
                needed = is_needed(session, blob.key)
            if not needed:
                blobs.delete(blob.key)
                swept += 1
    if swept:
        BLOBS_SWEPT.inc(swept)
        log.info("blobs.swept", count=swept)
    return swept


def is_needed(session: Session, key: str) -> bool:
    """Whether a row still needs this blob: its file, its job's result, or its live job."""
    of_file = select(File.id).where(File.blob_key == key, File.deleted_at.is_(None))
    parts = key.split("/")
    if parts[0] != "jobs" or len(parts) < 4:
        return session.scalars(of_file).first() is not None
    job = session.scalars(select(Job).where(Job.id == parts[1])).one_or_none()
    if job is not None and (job.state in LIVE or (job.result or {}).get("prefix") in _folders_of(key)):
        return True
    return session.scalars(of_file).first() is not None


def _is_cancelled(session: Session, job_id: str) -> bool:
    return session.scalars(select(Job.state).where(Job.id == job_id)).one_or_none() == JobState.CANCELLED


_CRASHED: dict[str, object] = {"code": "worker_crashed"}


def _folders_of(key: str) -> list[str]:
    parts = key.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


@dataclass(frozen=True)
class _Waiting:
    # jobs that wait for a worker: the task that helps them, and which jobs these are
    task: TaskName
    which: tuple[ColumnElement[bool], ...]

    def count(self, session: Session) -> int:
        return session.scalars(select(func.count()).select_from(Job).where(*self.which)).one()

    def mark(self, session: Session, queue: str, room: int, rewake_seconds: float) -> list[Wake]:
        stale = or_(Job.woken_at.is_(None), Job.woken_at < db_now() - rewake_seconds)
        oldest = select(Job.id).where(*self.which, stale).order_by(Job.created_at, Job.seq).limit(max(0, room))
        marked = update(Job).where(Job.id.in_(oldest), stale).values(woken_at=db_now()).returning(Job.id)
        return [Wake(self.task, job_id, queue) for job_id in session.scalars(marked)]


def _waits(database: Database) -> dict[str, list[_Waiting]]:
    validating = _Waiting(CHECK_JOB, (Job.state == JobState.VALIDATING,))
    queued = Job.state == JobState.QUEUED, Job.run_after <= db_now(), base_is_ready()
    with database.reading() as session:
        by_queue = session.execute(
            select(Job.queue, func.count(), db_now() - func.min(Job.created_at)).where(*queued).group_by(Job.queue)
        ).all()
    JOBS_QUEUED.set(sum(count for _, count, _ in by_queue))
    OLDEST_WAIT_SECONDS.set(max((age for _, _, age in by_queue), default=0.0))
    waits = {queue: [_Waiting(RUN_JOB, (*queued, Job.queue == queue))] for queue, _, _ in by_queue}
    return {CHECKS_QUEUE: [validating]} | waits

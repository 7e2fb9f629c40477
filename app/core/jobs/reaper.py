"""The reaper: takes back leases that ran out, sends lost wake-ups again, alarms of overdue checks, erases and sweeps.

It is a list of duties. Each is tried by itself, in transactions of its own, so that one that fails or waits holds up no
other; what asks the database, the broker and the blob store runs in a thread each. Every statement is conditional and
may run in any number of processes at once, so there is no leader; only the sweep is one process's at a time.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import structlog
from celery import Celery
from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from app.core import files, idempotency
from app.core.broker import CHECK_JOB, CHECKS_QUEUE, DEAD_LETTERS, RUN_JOB, TaskName, Wake, queue_depth, wake
from app.core.jobs import retention
from app.core.jobs.expiry import expire
from app.core.jobs.lease import base_is_ready
from app.core.jobs.sweep import sweep_in_turn
from app.core.jobs.waiting import count_baseless, route
from app.core.jobs.workers import count_resting
from app.core.settings import Settings
from app.core.storage.blobs import BlobStore
from app.core.storage.database import Database, db_now
from app.core.storage.identity import deployment_of
from app.core.storage.job_states import JobState
from app.core.storage.tables import File, Job
from app.core.telemetry import (
    CHECKS_OVERDUE,
    DUTIES_FAILED,
    DUTY_LAST_OK,
    JOBS_QUEUED,
    LETTERS_DEAD,
    OLDEST_WAIT_SECONDS,
    WORKERS_RESTING,
)

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_AT_ONCE = 100
_MINUTE = 60.0
# the longest pause before bytes that could not be deleted are tried again
_LONGEST_REST = 6 * 3600.0


@dataclass(frozen=True)
class Duty:
    """One thing that the reaper does, and how often; `run` raises where it failed."""

    name: str
    every_seconds: float
    run: Callable[[], object]


@dataclass
class Reaper:
    """Threads that do their duties until stopped; a duty that fails is logged and tried again when it is due."""

    database: Database
    celery: Celery
    blobs: BlobStore
    settings: Settings
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _wakes: SimpleQueue[Wake] = field(default_factory=SimpleQueue)

    def start(self) -> None:
        """Begin."""
        for name, duties in self._duties().items():
            thread = threading.Thread(target=self._run, args=(duties,), name=f"reaper-{name}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Stop after the duties under way; waits for them as long as one database call may take."""
        self._stop.set()
        deadline = time.monotonic() + self.settings.database_seconds + 1.0
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self, duties: Sequence[Duty]) -> None:
        due_at = {duty.name: 0.0 for duty in duties}
        while not self._stop.wait(self.settings.lease.reaper_tick_seconds):
            for duty in duties:
                if not self._stop.is_set() and time.monotonic() >= due_at[duty.name]:
                    do(duty)
                    due_at[duty.name] = time.monotonic() + duty.every_seconds

    def _duties(self) -> dict[str, list[Duty]]:
        """By what they wait for: a broker or a store that hangs must not keep a lease from being taken back."""
        database, blobs, settings = self.database, self.blobs, self.settings
        limits = settings.limits
        in_database = {
            "expire": lambda session: self._note(expire(session, settings.lease)),
            "note_overdue_checks": lambda session: note_overdue_checks(session, limits.check_seconds),
            "count_resting": lambda session: WORKERS_RESTING.set(count_resting(session)),
            "count_baseless": count_baseless,
            "route": _route,
            "hide_expired": files.hide_expired,
            "forget_replies": idempotency.forget_old,
        }
        kept = settings.retention
        now_and_then = {
            "hide_quarantined": lambda session: retention.hide_quarantined(session, kept),
            "forget_events": lambda session: retention.forget_events(session, kept),
            "forget_workers": lambda session: retention.forget_workers(session, kept),
        }
        return {
            "database": [
                *(Duty(name, 0.0, _committed(database, work)) for name, work in in_database.items()),
                *(Duty(name, _MINUTE, _committed(database, work)) for name, work in now_and_then.items()),
            ],
            "broker": [
                Duty("wake", 0.0, self._send),
                Duty("rewake", 0.0, lambda: rewake(database, self.celery, settings)),
            ],
            "store": [
                Duty("erase_deleted", 0.0, lambda: erase_deleted(database, blobs)),
                Duty("discard", _MINUTE, lambda: blobs.discard_unfinished(kept.unfinished_seconds)),
                Duty("sweep", min(_MINUTE, limits.sweep_seconds), lambda: sweep_in_turn(database, blobs, settings)),
            ],
        }

    def _note(self, wakes: Sequence[Wake]) -> None:
        # one that is sent before its commit finds nothing to do, and is sent again
        for due in wakes:
            self._wakes.put(due)

    def _send(self) -> None:
        try:
            while True:
                wake(self.celery, self._wakes.get_nowait())
        except Empty:
            pass


def do(duty: Duty) -> bool:
    """Try a duty, and say in log and metrics whether it was done."""
    try:
        duty.run()
    except Exception:
        DUTIES_FAILED.labels(duty=duty.name).inc()
        log.exception("reaper.duty_failed", duty=duty.name)
        return False
    DUTY_LAST_OK.labels(duty=duty.name).set_to_current_time()
    return True


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
    """Delete the bytes of hidden files; the rows stay as cursors. One that cannot be deleted rests meanwhile."""
    is_due = or_(File.erase_after.is_(None), File.erase_after <= db_now())
    with database.reading() as session:
        hidden = File.deleted_at.is_not(None), File.erased_at.is_(None), is_due
        due = session.execute(select(File.id, File.blob_key, File.erase_failures).where(*hidden).limit(_AT_ONCE)).all()
    for file_id, key, failures in due:
        values: dict[str, object] = {"erased_at": db_now()}
        try:
            blobs.delete(key)
        except Exception:
            log.exception("file.unerasable", file_id=file_id, failures=(failures or 0) + 1)
            rest = min(_LONGEST_REST, _MINUTE * 2.0 ** min(failures or 0, 16))
            values = {"erase_failures": (failures or 0) + 1, "erase_after": db_now() + rest}
        with database.writing() as session:
            session.execute(update(File).where(File.id == file_id).values(values))
            session.commit()


def _route(session: Session) -> None:
    own = deployment_of(session)
    if own is not None and own.queue is not None:
        route(session, own.queue)


def _committed(database: Database, work: Callable[[Session], object]) -> Callable[[], object]:
    """This work in a transaction of its own."""

    def run() -> None:
        with database.writing() as session:
            work(session)
            session.commit()

    return run


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

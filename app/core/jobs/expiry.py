"""What time does to a job under way: its lease runs out, it stands still, or the clock itself has jumped."""

import structlog
from sqlalchemy import ColumnElement, case, func, literal, select, update
from sqlalchemy.orm import Session

from app.core.broker import RUN_JOB, Wake
from app.core.jobs.ended import LossKind, lose, next_wakes
from app.core.jobs.jobs import JobError
from app.core.settings import LeaseSettings
from app.core.storage.database import db_now
from app.core.storage.job_states import LIVE, LONGEST_BACKOFF_SECONDS, JobState
from app.core.storage.tables import Job
from app.core.telemetry import LEASES_EXPIRED

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_AT_ONCE = 100
_CLOCKS_AGREE_SECONDS = 1.0


def expire(session: Session, timings: LeaseSettings) -> tuple[Wake, ...]:
    """Take running jobs back whose lease ran out or whose figures stand still; returns wake-ups for after the commit.

    A lease that ran out is the loss of a host. Standing still counts against the job, for its process lives.
    """
    _mend_clock(session, timings)
    return _expire_stalled(session, timings) + _expire_leases(session, timings)


def _expire_leases(session: Session, timings: LeaseSettings) -> tuple[Wake, ...]:
    wakes: list[Wake] = []
    over = Job.state == JobState.RUNNING, Job.lease_until < db_now()
    for job_id in session.scalars(select(Job.id).where(*over).limit(_AT_ONCE)).all():
        message = "The worker was lost; the job goes on from its last checkpoint"
        job = lose(session, timings, job_id, *over, kind=LossKind.HOST, message=message)
        if job is not None:
            LEASES_EXPIRED.inc()
            log.warning("lease.expired", job_id=job_id, fence=job.fence, host_losses=job.host_losses)
            wakes += _after(session, job)
    return tuple(wakes)


def _expire_stalled(session: Session, timings: LeaseSettings) -> tuple[Wake, ...]:
    wakes: list[Wake] = []
    stands = func.coalesce(Job.progress_at, Job.saved_at) < db_now() - _patience(timings)
    stalled = Job.state == JobState.RUNNING, stands
    for job_id in session.scalars(select(Job.id).where(*stalled).limit(_AT_ONCE)).all():
        error = JobError("job_stalled", "The job stopped making progress, each time it was tried. Ask the operator.")
        message = "The job stopped making progress; it goes on from its last checkpoint"
        job = lose(session, timings, job_id, *stalled, kind=LossKind.JOB, message=message, error=error)
        if job is not None:
            log.warning("job.stalled", job_id=job_id, fence=job.fence, stage=job.stage, losses=job.losses)
            wakes += _after(session, job)
    return tuple(wakes)


def _patience(timings: LeaseSettings) -> ColumnElement[float]:
    """For how long a job in this row's stage may show no progress."""
    of_stages = [(Job.stage == stage, literal(seconds)) for stage, seconds in timings.stall_seconds_of.items()]
    usual = literal(timings.stall_seconds)
    return case(*of_stages, else_=usual) if of_stages else usual


def _after(session: Session, job: Job) -> tuple[Wake, ...]:
    """The job itself, if it need not rest, and what its project may run in its place."""
    own = (Wake(RUN_JOB, job.id, job.queue),) if job.state == JobState.QUEUED and job.woken_at is not None else ()
    return own + tuple(wake for wake in next_wakes(session, job) if wake.id != job.id)


def _mend_clock(session: Session, timings: LeaseSettings) -> None:
    """Nothing lies further ahead than its own span: what does was written before the clock went back.

    A running job gets one more lease's time, in which a worker that lives renews it.
    """
    now, ttl = db_now(), timings.ttl_seconds
    running, live = Job.state == JobState.RUNNING, Job.state.in_(LIVE)
    ahead = now + _CLOCKS_AGREE_SECONDS
    for which, mended in (
        ((running, Job.lease_until > now + 2 * ttl), {"lease_until": now + ttl}),
        ((running, Job.progress_at > ahead), {"progress_at": now}),
        ((running, Job.saved_at > ahead), {"saved_at": now}),
        ((Job.state == JobState.QUEUED, Job.run_after > now + 2 * LONGEST_BACKOFF_SECONDS), {"run_after": now}),
        ((live, Job.woken_at > ahead), {"woken_at": None}),
    ):
        session.execute(update(Job).where(*which).values(mended))

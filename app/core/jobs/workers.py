"""Workers' health: who is there to take a job, who rests after too many lost ones, and when a worker is passed over."""

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from app.core.settings import LeaseSettings
from app.core.storage.database import db_now
from app.core.storage.job_states import LONGEST_BACKOFF_SECONDS
from app.core.storage.tables import Job, Worker


def note_present(session: Session, worker_id: str) -> bool:
    """Say that this worker is there; returns whether it is asked to drain."""
    seen = update(Worker).where(Worker.id == worker_id).values(seen_at=db_now()).returning(Worker.draining)
    return session.scalars(seen).one_or_none() or False


def note_faults(session: Session, worker_id: str, *, faults: int, rest_seconds: float) -> None:
    """Write how many jobs the worker has now lost in a row before they began, and how long it will take none."""
    until = db_now() + rest_seconds if rest_seconds > 0 else None
    session.execute(update(Worker).where(Worker.id == worker_id).values(faults=faults, resting_until=until))


def count_resting(session: Session) -> int:
    """How many workers take no job now because they lost several in a row."""
    return session.scalars(select(func.count()).select_from(Worker).where(_rests(Worker.resting_until))).one()


def is_left_to_others(timings: LeaseSettings, worker_id: str) -> ColumnElement[bool]:
    """Whether this worker has just lost the job and somebody else may take it: a condition on jobs."""
    other = aliased(Worker)
    somebody = select(other.id).where(
        other.id != worker_id,
        other.draining.is_(False),
        # an hour's jump of the clock makes nobody present
        other.seen_at.between(db_now() - timings.ttl_seconds, db_now() + timings.ttl_seconds),
        or_(other.resting_until.is_(None), ~_rests(other.resting_until)),
        other.queues.contains("," + Job.queue + ","),
    )
    longest = LONGEST_BACKOFF_SECONDS + timings.ttl_seconds
    avoided = and_(Job.avoid_until > db_now(), Job.avoid_until < db_now() + 2 * longest)
    # never NULL, whose opposite would refuse the claim of every job that nobody has lost
    lost_here = and_(Job.avoid_worker.is_not(None), Job.avoid_worker == worker_id)
    return and_(lost_here, avoided, somebody.correlate(Job).exists())


def _rests(until: InstrumentedAttribute[float | None]) -> ColumnElement[bool]:
    return and_(until > db_now(), until < db_now() + 2 * LONGEST_BACKOFF_SECONDS)

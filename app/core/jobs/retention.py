"""What is forgotten after a while, and when: the table in docs/getting-started/operator.md says it for people.

Each is a duty of the reaper, in portions, so that no transaction is long.
"""

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from app.core.settings import RetentionSettings
from app.core.storage.database import change, db_now
from app.core.storage.job_states import FINAL, JobState
from app.core.storage.tables import Artifact, BaseRow, Event, File, Job, Worker

DAY = 86_400.0
_AT_ONCE = 1000


def hide_quarantined(session: Session, settings: RetentionSettings) -> int:
    """Hide weights that the gate held back long enough, so that their bytes are erased; how many. Reports stay."""
    old = select(Job.id).where(Job.state.in_(FINAL), Job.finished_at < db_now() - settings.quarantined_days * DAY)
    held = select(Artifact.file_id).where(Artifact.quarantined, Artifact.job_id.in_(old))
    of_base = select(BaseRow.alignment_file).where(BaseRow.alignment_file.is_not(None))
    due = File.id.in_(held), File.deleted_at.is_(None), File.id.not_in(of_base)
    return change(session, update(File).where(*due).values(deleted_at=db_now()))


def forget_events(session: Session, settings: RetentionSettings) -> int:
    """Delete the story of jobs that ended long ago; how many lines. The job itself stays with its result."""
    old = select(Job.id).where(Job.state.in_(FINAL), Job.finished_at < db_now() - settings.events_days * DAY)
    portion = select(Event.seq).where(Event.job_id.in_(old)).limit(_AT_ONCE)
    return len(session.scalars(delete(Event).where(Event.seq.in_(portion)).returning(Event.seq)).all())


def forget_workers(session: Session, settings: RetentionSettings) -> int:
    """Delete rows of workers that ended; how many. One that may still be idle is kept a dozen times as long."""
    drained = Worker.draining & (Worker.seen_at < db_now() - settings.workers_days * DAY)
    silent = Worker.seen_at < db_now() - 12 * settings.workers_days * DAY
    busy = select(Job.worker_id).where(Job.state == JobState.RUNNING, Job.worker_id.is_not(None))
    gone = delete(Worker).where(drained | silent, Worker.id.not_in(busy))
    return len(session.scalars(gone.returning(Worker.seq)).all())

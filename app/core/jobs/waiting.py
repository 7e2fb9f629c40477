"""Jobs that wait: to which queue they go, and how many of them only the operator can help."""

from sqlalchemy import case, func, select, update
from sqlalchemy.orm import Session

from app.core.storage.database import change
from app.core.storage.job_states import JobState
from app.core.storage.tables import BaseRow, BaseStatus, Job
from app.core.telemetry import JOBS_WITHOUT_BASE
from finetuning.contract.recipe import JobKind


def count_baseless(session: Session) -> int:
    """How many jobs wait for a base that is not served, also as a metric: without the operator they wait for ever."""
    waiting = Job.kind == JobKind.FINETUNE, Job.state.in_((JobState.VALIDATING, JobState.QUEUED))
    lost = BaseRow.status.in_((BaseStatus.FAILED, BaseStatus.RETIRED))
    of_lost = select(func.count()).select_from(Job).join(BaseRow, BaseRow.id == Job.base_id).where(*waiting, lost)
    count = session.scalars(of_lost).one()
    JOBS_WITHOUT_BASE.set(count)
    return count


def route(session: Session, queue: str) -> int:
    """Send jobs that wait for training to this queue, whichever they were created for; returns how many moved."""
    waiting = Job.state.in_((JobState.VALIDATING, JobState.QUEUED, JobState.RUNNING)), Job.queue != queue
    # not woken yet on this queue, so the reaper does it
    woken_at = case((Job.state == JobState.QUEUED, None), else_=Job.woken_at)
    return change(session, update(Job).where(*waiting).values(queue=queue, woken_at=woken_at))

"""The broker: the Celery object, its queues, and wake-ups.

Knows task names, queues and the wire to the broker; must not know what tasks do (they are sent by name).
A message carries one id and nothing else, and only wakes: the database is the truth, the reaper sends again.
"""

from dataclasses import dataclass
from typing import Literal

from celery import Celery

from app.core.settings import Settings

TaskName = Literal["immunotune.check_file", "immunotune.check_job", "immunotune.run_job"]

CHECK_FILE: TaskName = "immunotune.check_file"
CHECK_JOB: TaskName = "immunotune.check_job"
RUN_JOB: TaskName = "immunotune.run_job"
CHECKS_QUEUE = "checks"
CPU_QUEUE = "train.cpu"


@dataclass(frozen=True)
class Wake:
    """A message to send once the transaction that made it due is committed."""

    task: TaskName
    id: str
    queue: str


def make_celery(settings: Settings) -> Celery:
    """The Celery object for senders and workers alike; connects to nothing yet."""
    raise NotImplementedError


def wake(celery: Celery, *wakes: Wake) -> None:
    """Send messages; a failure is logged and never raised, for the reaper sends again."""
    raise NotImplementedError


def queue_depth(celery: Celery, queue: str) -> int | None:
    """How many messages wait; None when the broker does not answer."""
    raise NotImplementedError

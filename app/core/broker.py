"""The broker: the Celery object, its queues, and wake-ups.

A message carries one id and nothing else, and only wakes: the database is the truth, the reaper sends again. Must not
import tasks: they are sent by name, so that the API loads none of them.
"""

from dataclasses import dataclass
from typing import Literal

import structlog
from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from app.core.settings import Settings
from app.core.telemetry import WAKES_FAILED

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

BROKER_DOWN = (OperationalError, RedisError, OSError)

TaskName = Literal["immunotune.check_job", "immunotune.run_job"]

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
    app = Celery("immunotune", broker=settings.broker_url, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_default_queue=CHECKS_QUEUE,
        # a message only wakes, so it is acknowledged before the work: with a late acknowledgement the broker
        # would redeliver every job that outlives its visibility timeout
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={"socket_connect_timeout": 1.0, "socket_timeout": 30.0, "max_retries": 1},
    )
    return app


def wake(celery: Celery, *wakes: Wake) -> None:
    """Send messages; a failure is logged and never raised, for the reaper sends again."""
    for due in wakes:
        try:
            # the one retry replaces a pooled connection that a restarted broker has dropped
            celery.send_task(
                due.task,
                args=[due.id],
                queue=due.queue,
                retry=True,
                retry_policy={"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0},
            )
        except BROKER_DOWN as error:
            WAKES_FAILED.inc()
            log.warning("wake.failed", task=due.task, id=due.id, queue=due.queue, reason=type(error).__name__)


def queue_depth(celery: Celery, queue: str) -> int | None:
    """How many messages wait; None when the broker does not answer."""
    try:
        with celery.connection_for_write(connect_timeout=1.0) as connection:
            # a passive declare would do for any broker, but on Redis it fails on an empty queue
            return int(connection.default_channel.client.llen(queue))
    except BROKER_DOWN as error:
        log.warning("broker.unreachable", queue=queue, reason=type(error).__name__)
        return None

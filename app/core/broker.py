"""The broker: the Celery object, its queues, and wake-ups.

A message carries one id and nothing else, and only wakes: the database is the truth, the reaper sends again. Must not
import tasks: they are sent by name, so that the API loads none of them.
"""

import threading
from dataclasses import dataclass, field
from queue import Empty, Full, Queue
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
# a list, not a queue of a worker: what came as a message and was none (worker.messages)
DEAD_LETTERS = "immunotune.dead"
_SENDER_SECONDS = 1.0
# longer than the broker keeps an idle consumer waiting for its answer
_CONSUMER_SECONDS = 30.0
_MOST_UNSENT = 1000


@dataclass(frozen=True)
class Wake:
    """A message to send once the transaction that made it due is committed."""

    task: TaskName
    id: str
    queue: str


def make_celery(settings: Settings, *, consumes: bool = False) -> Celery:
    """The Celery object of a sender, or of a worker; connects to nothing yet."""
    seconds = _CONSUMER_SECONDS if consumes else _SENDER_SECONDS
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
        broker_transport_options={"socket_connect_timeout": 1.0, "socket_timeout": seconds, "max_retries": 1},
    )
    return app


@dataclass
class Waker:
    """Sends messages from a thread of its own: whoever has an answer to give must not wait for a broker."""

    celery: Celery
    _due: Queue[Wake | None] = field(default_factory=lambda: Queue(_MOST_UNSENT))
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to send."""
        self._thread = threading.Thread(target=self._run, name="waker", daemon=True)
        self._thread.start()

    def soon(self, *wakes: Wake) -> None:
        """Send these when the broker takes them; returns at once. What is lost, the reaper sends again."""
        for due in wakes:
            try:
                self._due.put_nowait(due)
            except Full:
                WAKES_FAILED.inc()

    def stop(self) -> None:
        """Send what is left while the broker takes it, for a moment."""
        if self._thread is not None:
            self._drop_if_full()
            self._due.put(None)
            self._thread.join(2 * _SENDER_SECONDS)

    def _run(self) -> None:
        while (due := self._due.get()) is not None:
            try:
                if not wake(self.celery, due):
                    self._drop()  # they would wait for the same broker, a second or more each
            except Exception:  # a rim: nobody would notice that this thread has ended
                WAKES_FAILED.inc()
                log.exception("wake.broke", task=due.task, id=due.id)

    def _drop_if_full(self) -> None:
        if self._due.full():
            self._drop()

    def _drop(self) -> None:
        try:
            while True:
                if self._due.get_nowait() is None:
                    self._due.put(None)
                    return
                WAKES_FAILED.inc()
        except Empty:
            pass


def wake(celery: Celery, *wakes: Wake) -> bool:
    """Send messages, now; a failure is logged and never raised, for the reaper sends again. False when one failed."""
    all_sent = True
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
            all_sent = False
            WAKES_FAILED.inc()
            log.warning("wake.failed", task=due.task, id=due.id, queue=due.queue, reason=type(error).__name__)
    return all_sent


def queue_depth(celery: Celery, queue: str) -> int | None:
    """How many messages wait; None when the broker does not answer."""
    try:
        with celery.connection_for_write(connect_timeout=1.0) as connection:
            # a passive declare would do for any broker, but on Redis it fails on an empty queue
            return int(connection.default_channel.client.llen(queue))
    except BROKER_DOWN as error:
        log.warning("broker.unreachable", queue=queue, reason=type(error).__name__)
        return None

"""The Celery side of a worker: tasks by name, what each process opens, and the drain signal.

A message only says "look": the database is the truth, so a lost or doubled message costs one reminder or one refused
claim. No torch: training runs in a process of its own.
"""

import multiprocessing
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog
from celery import Celery
from celery.signals import worker_init, worker_process_init, worker_shutting_down

from app.core import broker
from app.core.broker import CHECK_JOB, RUN_JOB, Wake
from app.core.deployment import require_ours
from app.core.errors import StartRefused, StoreDown
from app.core.jobs import lease
from app.core.settings import Settings
from app.core.storage.blobs import open_blobs
from app.core.storage.database import DATABASE_DOWN, open_database
from app.core.telemetry import configure_logging
from finetuning.contract.recipe import Recipe
from finetuning.safety_rows.operator_file import BadOperatorRows, require_fit
from worker import checks, presence
from worker.attempt.launch import Launcher, WrongDevice, device_of, launch_command, usable_cores
from worker.attempt.supervisor import Host, supervise
from worker.messages import guard_transport
from worker.processes import die_with_parent

_log = structlog.get_logger(__name__)

HARD_LIMIT_GRACE_SECONDS = 600.0
# what a recipe may ask for unless an operator's own registry says more
MAX_JOB_SECONDS = Recipe.model_fields["max_seconds"].default


@dataclass
class _Process:
    """What this process opened: the parent enrols the worker, its pool process opens the rest after the fork."""

    queues: Sequence[str]
    worker_id: str = ""
    host: Host | None = field(default=None)

    @property
    def opened(self) -> Host:
        assert self.host is not None, "the pool process was not initialised"
        return self.host


def run_worker(settings: Settings, queues: Sequence[str], *, launcher: Launcher = launch_command) -> int:
    """Serve these queues until SIGTERM, one message at a time; returns the exit status.

    SIGTERM drains: the job under way is saved, handed back and taken up by another worker.
    """
    configure_logging("worker", settings.log_level)  # a refusal belongs on standard error, too
    try:
        require_fit(settings.operator_rows)
        device = device_of(queues)
    except (BadOperatorRows, WrongDevice) as error:
        _log.error("worker.refused", reason=str(error))
        return 1  # every job of this worker would be lost
    if not _is_ours(settings):
        return 1  # whoever watches over this process starts it again
    if device != "auto":
        settings = settings.model_copy(update={"device": device})
    celery = build_worker(settings, queues, launcher=launcher)
    arguments = ["worker", "--queues", ",".join(queues), "--pool", "prefork", "--concurrency", "1"]
    arguments += ["--without-gossip", "--without-mingle", "--loglevel", settings.log_level]
    celery.worker_main(arguments)
    return 0


def _is_ours(settings: Settings) -> bool:
    """Whether the deployment lets this worker in; the log says why not.

    Asked in a process of its own: an object store's client that was used before a fork hangs in the pool process.
    """

    def ask() -> None:
        try:
            require_ours(settings)
        except StartRefused as error:
            _log.critical("start.refused", reason=str(error))
            sys.exit(1)
        except (StoreDown, *DATABASE_DOWN) as error:
            _log.critical("start.failed", reason=type(error).__name__)
            sys.exit(1)

    asking = multiprocessing.get_context("fork").Process(target=ask)
    asking.start()
    asking.join()
    return asking.exitcode == 0


def build_worker(settings: Settings, queues: Sequence[str] = (), *, launcher: Launcher = launch_command) -> Celery:
    """The composition root of a worker: the Celery object with its tasks and signal handlers; opens nothing yet."""
    guard_transport()
    celery = broker.make_celery(settings, consumes=True)
    celery.conf.update(worker_hijack_root_logger=False, worker_redirect_stdouts=False, worker_disable_prefetch=True)
    process = _Process(queues)
    _connect_signals(settings, process, launcher)

    def run_job(job_id: str) -> None:
        _guarded(lambda: supervise(process.opened, job_id))
        presence.rest(process.opened)

    def check_job(job_id: str) -> None:
        _guarded(lambda: checks.check_job(process.opened, job_id))

    # the last resort: the supervisor and the check keep their own, shorter time
    tasks = (RUN_JOB, run_job, MAX_JOB_SECONDS), (CHECK_JOB, check_job, settings.limits.check_seconds)
    for name, body, seconds in tasks:
        celery.task(body, name=name, time_limit=seconds + HARD_LIMIT_GRACE_SECONDS)
    return celery


def _connect_signals(settings: Settings, process: _Process, launcher: Launcher) -> None:
    def enrol(**_: object) -> None:
        database = open_database(settings)
        try:
            with database.writing() as session:
                host, devices = socket.gethostname(), f"{usable_cores()} cores"
                process.worker_id = lease.enrol_worker(session, host=host, devices=devices, queues=process.queues)
                session.commit()
        finally:
            database.close()  # a connection must not cross the fork

    def open_all(**_: object) -> None:
        die_with_parent()
        process.host = Host(
            settings=settings,
            database=open_database(settings),
            blobs=open_blobs(settings),
            worker_id=process.worker_id,
            wake=_waker(broker.make_celery(settings)),
            launcher=launcher,
        )
        presence.say_present(process.host)

    def drain(**_: object) -> None:
        database = open_database(settings)
        try:
            with database.writing() as session:
                lease.drain_worker(session, process.worker_id)
                session.commit()
        except DATABASE_DOWN as error:
            _log.warning("drain.unsaid", error=type(error).__name__)  # the lease runs out instead
        finally:
            database.close()

    worker_init.connect(enrol, weak=False)
    worker_process_init.connect(open_all, weak=False)
    worker_shutting_down.connect(drain, weak=False)


def _waker(celery: Celery) -> Callable[[tuple[Wake, ...]], object]:
    return lambda wakes: broker.wake(celery, *wakes)


def _guarded(work: Callable[[], None]) -> None:
    try:
        work()
    except DATABASE_DOWN as error:
        _log.error("database.down", error=type(error).__name__)  # the reaper wakes us again

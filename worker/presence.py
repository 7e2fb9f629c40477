"""What a worker's pool process does besides jobs: say that it is there, and rest when its host seems sick."""

import threading

import structlog

from app.core.jobs import workers
from app.core.storage.database import DATABASE_DOWN
from worker.attempt.supervisor import Host

_log = structlog.get_logger(__name__)


def say_present(host: Host) -> None:
    """From now on, write every quarter of a lease's time that this worker is there, in a thread of its own.

    Others then leave a job to it that they have just lost.
    """

    def run() -> None:
        pause = threading.Event()
        while True:
            try:
                is_draining(host)
            except Exception:  # noqa: BLE001 - a rim: the thread must outlive what it cannot foresee
                _log.exception("presence.failed")
            pause.wait(host.settings.lease.ttl_seconds / 4)

    threading.Thread(target=run, name="presence", daemon=True).start()


def rest(host: Host) -> None:
    """Wait while the worker's breaker is open, so that this process takes no further message; a drain ends it."""
    if host.breaker.rest_seconds > 0:
        _log.warning("worker.rest_begins", faults=host.breaker.faults, seconds=host.breaker.rest_seconds)
        host.breaker.wait(lambda: is_draining(host), look_every_seconds=host.settings.lease.beat_seconds)


def is_draining(host: Host) -> bool:
    """Whether the worker is asked to stop; False while the database cannot be asked."""
    try:
        with host.database.writing() as session:
            draining = workers.note_present(session, host.worker_id)
            session.commit()
    except DATABASE_DOWN as error:
        _log.warning("presence.unsaid", error=type(error).__name__)
        return False
    return draining

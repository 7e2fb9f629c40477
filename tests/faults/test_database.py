"""The database stands still, is locked, or ends at once: the API says when to come again, and no job is lost."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import httpx2
import pytest

from app.core.storage.database import open_database
from tests.faults.conftest import BRIEF
from tests.support.backends import BACKEND, stop_writers
from tests.support.processes import is_gone, suspended
from tests.support.running import SECONDS, Running
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(300)]
Fault = Callable[[Running], AbstractContextManager[None]]
# what the API may take to say that its database does not answer: it finds out on an old and on a new connection
BOUND_SECONDS = 10.0


@contextmanager
def locked(service: Running) -> Iterator[None]:
    """Somebody holds every table, or SQLite's one lock."""
    other = open_database(service.scene.settings)
    try:
        with other.writing() as session:
            stop_writers(session)
            yield
            session.rollback()
    finally:
        other.close()


@contextmanager
def stands_still(_: Running) -> Iterator[None]:
    """The server's processes are suspended: connections stay open and nothing answers."""
    process = BACKEND.postgres_server().process
    assert process is not None
    with suspended(process.pid):
        yield


@contextmanager
def is_gone_at_once(_: Running) -> Iterator[None]:
    """The server ends as in a crash, in the middle of whatever it does, and recovers when it is started again."""
    server = BACKEND.postgres_server()
    server.end(signal.SIGQUIT)
    try:
        yield
    finally:
        server.start()


@pytest.mark.parametrize("fault", [locked, stands_still, is_gone_at_once])
def test_a_database_that_is_away_beyond_the_lease_costs_time(service: Running, fault: Fault) -> None:
    """The training process stops before the lease ends, the API answers 503, and all goes on by itself."""
    if fault is not locked and not BACKEND.is_production:
        pytest.skip("SQLite has no process of its own")
    service.start_api()
    service.start_worker(step_seconds=0.2)
    job_id = service.submit()
    training = service.wait_for_checkpoint(job_id)
    wanted = {"model": "tiny", "training_file": service.upload()}
    with service.client() as http:
        with fault(service):
            begin = time.monotonic()
            refused = http.post("/fine_tuning/jobs", json=wanted)
            assert time.monotonic() - begin < BOUND_SECONDS
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
            assert int(refused.headers["Retry-After"]) >= 1
            assert_prompt(service, http, job_id, reads_go_on=fault is locked)
            wait_until(lambda: is_gone(training), seconds=BRIEF.ttl_seconds)
            wait_until(lambda: time.monotonic() - begin > BRIEF.ttl_seconds, seconds=SECONDS)
        wait_until(service.is_ready, seconds=SECONDS)
        assert http.post("/fine_tuning/jobs", json=wanted).status_code == 200
        assert len(http.get("/fine_tuning/jobs").json()["data"]) == 2
    service.assert_ends_as_ever(job_id)


def assert_prompt(service: Running, http: httpx2.Client, job_id: str, *, reads_go_on: bool) -> None:
    """More questions at once than the API has threads are each answered in time, and whether it lives at once."""
    found: list[tuple[int, float]] = []

    def ask() -> None:
        begin = time.monotonic()
        status = http.get(f"/fine_tuning/jobs/{job_id}").status_code
        found.append((status, time.monotonic() - begin))

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    assert httpx2.get(f"{service.url}/healthz", verify=False, timeout=5.0).status_code == 200
    assert time.monotonic() - begin < 2.0
    for thread in threads:
        thread.join()
    assert {status for status, _ in found} == {200 if reads_go_on else 503}
    assert max(seconds for _, seconds in found) < BOUND_SECONDS

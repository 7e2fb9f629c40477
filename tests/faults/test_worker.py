"""Training process, supervisor or Celery worker: killed, or suspended beyond the lease while others take over.

What a kill does to a single attempt is in tests/worker/test_kills.py.
"""

import pytest

from tests.support.processes import children_of, is_gone, suspended
from tests.support.running import SECONDS, Running
from tests.support.waiting import wait_until
from worker.processes import stop

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("who", ["supervisor", "worker"])
def test_who_stands_still_beyond_the_lease_comes_back_as_nobody(service: Running, who: str) -> None:
    """Another has the job by then: what the first one still does changes no row and no blob, and it works on.

    The supervisor alone, whose training process goes on meanwhile; then all of a worker, as on a suspended machine.
    """
    service.start_reaper()
    first = service.start_worker(step_seconds=0.1)
    job_id = service.submit()
    training = service.wait_for_checkpoint(job_id)
    (supervisor,) = children_of(first.process.pid)
    with suspended(supervisor if who == "supervisor" else first.process.pid, alone=who == "supervisor"):
        second = service.start_worker(step_seconds=0.1)
        wait_until(lambda: service.scene.job(job_id).fence == 2, seconds=SECONDS)
        wait_until(lambda: any(fence == 2 for _, fence in service.scene.checkpoints(job_id)), seconds=SECONDS)
    wait_until(lambda: is_gone(training), seconds=SECONDS)
    service.assert_ends_as_ever(job_id)
    assert service.scene.checkpoints(job_id)[-1] == (30, 2)
    assert service.scene.job(job_id).fence == 2
    stop([second])
    after = service.submit(steps=10)
    service.assert_ends_as_ever(after, steps=10)
    assert first.is_alive

"""The broker ends, with its file or without, or stands still: jobs wait a little longer, running ones not at all."""

import pytest

from app.core.storage.job_states import JobState
from tests.support.processes import suspended
from tests.support.running import Running

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("keeps_its_file", [True, False], ids=["with its file", "emptied"])
def test_a_killed_broker_loses_no_job(service: Running, *, keeps_its_file: bool) -> None:
    """Jobs that were waiting in it, and one that is created while it is away, are each done, and once."""
    service.start_api()
    service.start_worker(queues="checks,train.cpu")
    running = service.submit()
    service.wait_for_checkpoint(running)
    waiting = service.submit()
    file_id = service.upload()
    service.started[0].process.kill()
    service.started[0].process.wait()
    with service.client(timeout=10.0) as http:
        reply = http.post("/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id})
        assert reply.status_code == 200
        created = str(reply.json()["id"])
        assert http.get(f"/fine_tuning/jobs/{created}").json()["status"] == "validating_files"
    service.assert_ends_as_ever(running)
    if not keeps_its_file:
        service.forget_messages()
    service.start_broker()
    service.assert_ends_as_ever(waiting)
    service.wait_for_state(created, JobState.SUCCEEDED)
    assert [service.scene.job(job_id).fence for job_id in (running, waiting, created)] == [1, 1, 1]


def test_a_broker_that_stands_still_beyond_the_lease_is_not_noticed(service: Running) -> None:
    """A create is answered at once, the running job ends, and what waited is done when the broker goes on."""
    service.start_api()
    service.start_worker(queues="checks,train.cpu")
    running = service.submit(steps=200)
    service.wait_for_checkpoint(running)
    file_id = service.upload()
    with suspended(service.started[0].process.pid), service.client(timeout=5.0) as http:
        reply = http.post("/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id})
        assert reply.status_code == 200
        created = str(reply.json()["id"])
        service.assert_ends_as_ever(running, steps=200)
        assert http.get(f"/fine_tuning/jobs/{created}").json()["status"] == "validating_files"
    service.wait_for_state(created, JobState.SUCCEEDED)
    assert [service.scene.job(job_id).fence for job_id in (running, created)] == [1, 1]

"""The API is killed: before its commit nothing has happened, after it the client's retry finds what has."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.storage.job_states import JobState
from tests.faults.conftest import BRIEF
from tests.support.backends import lock_out
from tests.support.running import SECONDS, Running, running
from tests.support.waiting import wait_until
from worker.processes import StartedProgram

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Running]:
    """A service whose API waits for its database for as long as a test needs."""
    with running(tmp_path, BRIEF, database_seconds=30.0) as opened:
        yield opened


def kill(program: StartedProgram) -> None:
    program.process.kill()
    program.process.wait()


def jobs_of(service: Running) -> list[str]:
    return [job.id for job in service.sdk(max_retries=0).fine_tuning.jobs.list()]


def test_a_create_that_is_killed_before_its_commit_is_one_job_by_the_sdks_retry(patient: Running) -> None:
    """The SDK gets no answer, asks again until there is an API, and only that has an effect."""
    api = patient.start_api()
    patient.start_worker(queues="checks,train.cpu")
    file_id, created = patient.upload(), list[str]()
    client = patient.sdk(max_retries=30)

    def create() -> None:
        created.append(client.fine_tuning.jobs.create(model="tiny", training_file=file_id).id)

    asking = threading.Thread(target=create)
    with lock_out(patient.scene.database) as waiting:
        asking.start()
        wait_until(waiting, seconds=SECONDS)
        kill(api)
    patient.start_api()
    asking.join(SECONDS)
    (job_id,) = created
    patient.wait_for_state(job_id, JobState.SUCCEEDED)
    assert jobs_of(patient) == [job_id]
    assert patient.scene.job(job_id).fence == 1


def test_a_create_that_is_killed_after_its_commit_is_one_job_and_is_woken(service: Running) -> None:
    """Its wake-up and its answer are lost: the retry gets that job's id, and the reaper wakes it."""
    api = service.start_api()
    service.start_worker(queues="checks,train.cpu")
    wanted = {"model": "tiny", "training_file": service.upload()}
    kill(service.started[0])
    with service.client() as http, http.stream("POST", "/fine_tuning/jobs", json=wanted):
        (job_id,) = jobs_of(service)
        kill(api)  # nobody has read the answer
    service.start_broker()
    service.start_api()
    with service.client() as http:
        again = http.post("/fine_tuning/jobs", json=wanted, headers={"x-stainless-retry-count": "1"})
    assert (again.status_code, again.json()["id"]) == (200, job_id)
    service.wait_for_state(job_id, JobState.SUCCEEDED)
    assert jobs_of(service) == [job_id]
    assert service.scene.job(job_id).fence == 1


def test_a_running_job_does_not_notice_that_the_api_is_killed(service: Running) -> None:
    """It goes on, and is asked about again when there is an API."""
    api = service.start_api()
    service.start_worker()
    job_id = service.submit()
    service.wait_for_checkpoint(job_id)
    kill(api)
    service.assert_ends_as_ever(job_id)
    service.start_api()
    with service.client() as http:
        assert http.get(f"/fine_tuning/jobs/{job_id}").json()["status"] == "succeeded"
    assert service.scene.job(job_id).fence == 1

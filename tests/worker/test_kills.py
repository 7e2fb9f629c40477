"""Real workers, a real broker, a real reaper, and kill -9: each job still ends right, with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from app.core import broker
from app.core.broker import DEAD_LETTERS, RUN_JOB, Wake
from app.core.jobs import jobs
from app.core.storage.job_states import JobState
from app.core.storage.tables import Worker
from tests.support.backends import broker_client
from tests.support.processes import children_of, descendants, is_gone
from tests.support.running import PROGRAMS, SECONDS, Running, running
from tests.support.waiting import wait_until
from tests.support.worlds import FAST, SHORT, recipe
from worker.processes import stop

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path, FAST) as opened:
        opened.start_reaper()
        yield opened


@pytest.fixture
def expiring(tmp_path: Path) -> Iterator[Running]:
    """The same with leases short enough to wait for their end."""
    with running(tmp_path, SHORT) as opened:
        opened.start_reaper()
        yield opened


def test_a_killed_training_process_changes_no_byte(service: Running) -> None:
    service.start_worker()
    job_id = service.submit()
    os.kill(service.wait_for_checkpoint(job_id), signal.SIGKILL)
    service.wait_for_state(job_id, JobState.SUCCEEDED)
    assert service.scene.job(job_id).fence == 2
    service.assert_same_as_undisturbed(job_id)


def test_a_killed_supervisor_takes_its_child_along_and_the_job_goes_on(expiring: Running) -> None:
    worker = expiring.start_worker()
    job_id = expiring.submit()
    training = expiring.wait_for_checkpoint(job_id)
    (supervisor,) = children_of(worker.process.pid)
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: is_gone(training), seconds=5.0)
    assert expiring.scene.job(job_id).state == JobState.RUNNING
    expiring.wait_for_state(job_id, JobState.SUCCEEDED)
    assert "The worker was lost; the job goes on from its last checkpoint" in expiring.scene.messages(job_id)
    expiring.assert_same_as_undisturbed(job_id)


def test_a_killed_worker_leaves_no_process_and_another_takes_over(expiring: Running) -> None:
    worker = expiring.start_worker()
    job_id = expiring.submit()
    training = expiring.wait_for_checkpoint(job_id)
    below = descendants(worker.process.pid)
    assert training in below
    worker.process.kill()
    wait_until(lambda: all(is_gone(pid) for pid in below), seconds=5.0)
    expiring.start_worker()
    expiring.wait_for_state(job_id, JobState.SUCCEEDED)
    expiring.assert_same_as_undisturbed(job_id)


def test_a_stopped_worker_hands_its_job_over(service: Running) -> None:
    worker = service.start_worker()
    job_id = service.submit()
    service.wait_for_checkpoint(job_id)
    stop([worker])
    assert service.scene.job(job_id).state == JobState.QUEUED
    assert service.scene.job(job_id).losses == 0
    service.start_worker()
    service.wait_for_state(job_id, JobState.SUCCEEDED)
    service.assert_same_as_undisturbed(job_id)


def test_a_running_job_does_not_notice_that_the_broker_dies(service: Running) -> None:
    service.start_worker()
    job_id = service.submit()
    service.wait_for_checkpoint(job_id)
    service.started[0].process.kill()
    service.started[0].process.wait()
    second = service.submit()  # its wake-up is lost, its row is not
    service.wait_for_state(job_id, JobState.SUCCEEDED)
    assert service.scene.job(job_id).fence == 1
    service.start_broker()
    service.wait_for_state(second, JobState.SUCCEEDED)
    assert service.adapter(job_id) == service.adapter(second)


def test_a_job_committed_by_an_api_that_died_is_woken(service: Running) -> None:
    service.start_worker()
    died = subprocess.run(
        [sys.executable, "-P", str(PROGRAMS / "api.py")],
        input=recipe(steps=10).model_dump_json(),
        env=service.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    service.wait_for_state(died.stdout, JobState.SUCCEEDED)


def test_cancel_ends_the_training_process_and_frees_the_worker(service: Running) -> None:
    service.start_worker(hang_at=15)
    job_id = service.submit()
    training = service.wait_for_checkpoint(job_id)
    with service.scene.database.writing() as session:
        jobs.cancel(session, service.scene.job(job_id).project_id, job_id)
        session.commit()
    wait_until(lambda: is_gone(training), seconds=FAST.beat_seconds + 5.0)
    assert service.scene.job(job_id).state == JobState.CANCELLED
    second = service.submit()
    wait_until(lambda: service.scene.checkpoints(second), seconds=SECONDS)


def test_what_is_no_message_is_put_aside_and_the_worker_goes_on(service: Running) -> None:
    """S23: `LPUSH checks garbage` ended the Celery worker, and in `./run up` after some of them the whole service."""
    worker = service.start_worker()
    client = broker_client(service.scene.settings)
    pickled = b'{"body": "gASVBAAAAAAAAACMAWGULg==", "content-type": "application/x-python-serialize", "headers": {}}'
    garbage = [b"garbage", b"5", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"__type__": "uuid", "__value__": 1}', pickled]
    broker.wake(service.celery, Wake(RUN_JOB, "ftjob-x", "elsewhere"))
    odd = json.loads(client.rpop("elsewhere"))
    odd["headers"]["timelimit"] = 5
    garbage.append(json.dumps(odd).encode())
    for one in garbage:
        client.lpush("train.cpu", one)
    job_id = service.submit()
    service.wait_for_state(job_id, JobState.SUCCEEDED)
    assert worker.is_alive
    assert client.llen(DEAD_LETTERS) == len(garbage)
    kept = [json.loads(found) for found in client.lrange(DEAD_LETTERS, 0, -1)]
    assert (kept[-1]["text"], kept[-2]["text"]) == ("garbage", "5")
    assert all(len(found["text"]) <= 2000 for found in kept)


def test_a_sick_worker_stops_claiming_and_another_does_its_work(service: Running, tmp_path: Path) -> None:
    """S1: it neither fails the queue nor empties it, and it can be stopped while it rests."""
    sick = tmp_path / "sick"
    sick.touch()
    resting = service.start_worker(exit_while=str(sick))
    jobs_of_all = [service.submit() for _ in range(4)]

    def faults() -> list[int]:
        with service.scene.database.reading() as session:
            at_work = Worker.id != service.scene.worker_id
            return list(session.scalars(select(Worker.faults).where(at_work).order_by(Worker.seq)))

    wait_until(lambda: faults() == [FAST.max_faults], seconds=SECONDS)
    fences = [service.scene.job(job_id).fence for job_id in jobs_of_all]
    assert sum(fences) == FAST.max_faults
    service.start_worker()
    for job_id in jobs_of_all:
        service.wait_for_state(job_id, JobState.SUCCEEDED)
    assert faults() == [FAST.max_faults, 0]
    asked = time.monotonic()
    stop([resting])
    assert time.monotonic() - asked < resting.program.grace_seconds / 2

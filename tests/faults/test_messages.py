"""Messages doubled, dropped, or none at all: a message only wakes, so each job is done, and once."""

import pytest

from app.core import broker
from app.core.broker import DEAD_LETTERS, RUN_JOB, Wake
from app.core.storage.blobs import read_bytes
from app.core.storage.job_states import JobState
from tests.support.backends import broker_client
from tests.support.running import SECONDS, Running
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(300)]


def test_two_workers_that_get_every_message_many_times_do_each_job_once(service: Running) -> None:
    """Both claim one job over a real broker, with noise in between: one wins, the other's claim costs nothing."""
    service.start_reaper()
    workers = [service.start_worker(), service.start_worker()]
    submitted = [service.submit(steps=20) for _ in range(3)]
    client = broker_client(service.scene.settings)
    for _ in range(5):
        broker.wake(service.celery, *(Wake(RUN_JOB, job_id, "train.cpu") for job_id in submitted))
        client.lpush("train.cpu", b"no message", b'{"id": 5}')
    for job_id in submitted:
        service.assert_ends_as_ever(job_id, steps=20)
        assert service.scene.job(job_id).fence == 1
        forms = list(service.scene.artifacts(job_id))
        assert len(forms) == len(set(forms))
        for blob in service.scene.blobs.list(f"jobs/{job_id}/"):
            assert len(read_bytes(service.scene.blobs, blob.key)) == blob.size_bytes
            assert blob.key.split("/")[2].startswith("1-")
    wait_until(lambda: client.llen(DEAD_LETTERS) == 10, seconds=SECONDS)
    assert all(worker.is_alive for worker in workers)


def test_messages_that_are_dropped_cost_time(service: Running) -> None:
    """What waited in the broker is gone, with nobody to notice: the reaper wakes again."""
    submitted = [service.submit(steps=10) for _ in range(2)]
    broker_client(service.scene.settings).flushall()
    service.start_worker()
    assert {service.scene.job(job_id).state for job_id in submitted} == {JobState.QUEUED}
    service.start_reaper()
    for job_id in submitted:
        service.assert_ends_as_ever(job_id, steps=10)
        assert service.scene.job(job_id).fence == 1

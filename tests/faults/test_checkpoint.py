"""A checkpoint that rots in the store between two attempts."""

import pytest

from app.core.storage.blobs import put_bytes, read_bytes
from tests.support.running import SECONDS, Running
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("rot", ["altered", "cut short", "gone"])
def test_a_rotten_checkpoint_costs_its_steps(service: Running, rot: str) -> None:
    """The worker dies, the newest checkpoint is no good: another worker goes back to the one before."""
    service.start_reaper()
    worker = service.start_worker(step_seconds=0.1)
    job_id = service.submit()
    wait_until(lambda: len(service.scene.checkpoints(job_id)) >= 2, seconds=SECONDS)
    worker.process.kill()
    worker.process.wait()
    step, _ = service.scene.checkpoints(job_id)[-1]
    blobs = service.scene.blobs
    (key,) = [blob.key for blob in blobs.list(f"jobs/{job_id}/") if blob.key.endswith(f"/{step}/loop.json")]
    whole = read_bytes(blobs, key)
    blobs.delete(key)
    if rot != "gone":
        put_bytes(blobs, key, whole[:-2] if rot == "cut short" else whole.replace(b"chain", b"chaos"))
    service.start_worker()
    service.assert_ends_as_ever(job_id)
    told = [message for message in service.scene.messages(job_id) if "cannot be used" in message]
    assert len(told) == 1
    assert (step, 1) in service.scene.checkpoints(job_id)
    assert (step, 2) in service.scene.checkpoints(job_id)

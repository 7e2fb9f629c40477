"""The blob store stands still beyond the lease: transfers are refused, and jobs are published when it is back."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from app.core.storage.job_states import JobState
from tests.faults.conftest import BRIEF
from tests.support.backends import BACKEND
from tests.support.http import chat_rows
from tests.support.processes import suspended
from tests.support.running import SECONDS, Running
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(300)]
# what a store may keep an upload waiting: its own limit, and a second try within it
BOUND_SECONDS = 45.0


@contextmanager
def store_away(service: Running) -> Iterator[None]:
    """An S3 server that is suspended; of a folder, the mount that is gone."""
    if BACKEND.is_production:
        with suspended(BACKEND.s3_pid()):
            yield
        return
    root = service.scene.settings.data / "blobs"
    away = root.with_name("blobs-away")
    root.rename(away)
    root.write_text("no folder")
    try:
        yield
    finally:
        root.unlink()
        away.rename(root)


def test_a_store_that_is_away_beyond_the_lease_costs_time(service: Running) -> None:
    """A job that ends meanwhile is published later; the API refuses transfers only."""
    service.start_api()
    service.start_worker()
    job_id = service.submit()
    service.wait_for_checkpoint(job_id)
    file_id = service.upload()
    with service.client(timeout=BOUND_SECONDS) as http:
        with store_away(service):
            begin = time.monotonic()
            for reply in (
                http.get(f"/files/{file_id}/content"),
                http.post("/files", files={"file": ("b.jsonl", chat_rows(13))}, data={"purpose": "fine-tune"}),
            ):
                assert (reply.status_code, reply.json()["error"]["code"]) == (503, "storage_unavailable")
                assert int(reply.headers["Retry-After"]) >= 1
            assert http.get(f"/fine_tuning/jobs/{job_id}").status_code == 200
            wait_until(lambda: time.monotonic() - begin > BRIEF.ttl_seconds, seconds=SECONDS)
            assert service.scene.job(job_id).state in (JobState.RUNNING, JobState.QUEUED)
        assert http.get(f"/files/{file_id}/content").status_code == 200
        assert len(http.get("/files").json()["data"]) >= 1
    service.assert_ends_as_ever(job_id)
    assert service.scene.job(job_id).host_losses == 0

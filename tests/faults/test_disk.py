"""A disk without room, under everything that the service writes, and under what the API writes alone."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.faults.conftest import BRIEF
from tests.support.backends import BACKEND
from tests.support.http import chat_rows
from tests.support.processes import is_gone
from tests.support.running import SECONDS, Running, running
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(300)]
# an attempt asks for 512 MiB before it begins
_DISK = "size=700m"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Running]:
    """A service whose data folder is a small disk of its own."""
    if BACKEND.is_production:
        pytest.skip("database and store have disks of their own there; see test_store.py")
    disk = tmp_path / "data"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", _DISK, "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        with running(tmp_path, BRIEF) as service:
            yield service
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Not a byte more goes onto the disk for the length of the block."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        size = 2**20
        while size:  # whatever others write meanwhile, the rest is taken
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
            except OSError:
                size //= 2
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def no_file_grows(pid: int) -> Iterator[None]:
    """The process can write no byte into any file, as on a full disk, its own log included."""
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, most))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))


def test_a_disk_that_is_full_under_everything_costs_time(small: Running) -> None:
    """Checkpoint, publish, rows and logs have no room: uploads are 507, the job waits, and then ends as ever."""
    small.start_api()
    small.start_worker(step_seconds=0.1)
    job_id = small.submit()
    training = small.wait_for_checkpoint(job_id)
    file_id = small.upload()
    data = small.scene.settings.data
    with small.client(timeout=60.0) as http:
        with filled(data):
            assert shutil.disk_usage(data).free == 0
            assert_no_room(upload(http))
            assert_no_room(http.post("/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id}))
            assert http.get(f"/fine_tuning/jobs/{job_id}").status_code == 200
            wait_until(lambda: is_gone(training), seconds=SECONDS)
        assert list((data / "blobs" / ".incoming").iterdir()) == []
        assert upload(http).status_code == 200
    small.assert_ends_as_ever(job_id)


def test_an_api_that_can_write_nothing_says_so(service: Running) -> None:
    """Its log is on that disk, too: what cannot be logged is answered all the same."""
    api = service.start_api()
    kept = service.upload()
    with service.client() as http:
        with no_file_grows(api.process.pid):
            replies = [upload(http), http.post("/fine_tuning/jobs", json={"model": "tiny", "training_file": kept})]
            assert http.get(f"/files/{kept}/content").status_code == 200
        if BACKEND.is_production:  # nothing of theirs lies on this disk
            assert [reply.status_code for reply in replies] == [200, 200]
        else:
            assert_no_room(replies[0])
            assert replies[1].status_code in (503, 507)
            assert replies[1].json()["error"]["message"]
        assert upload(http).status_code == 200
    assert api.is_alive


def upload(http: httpx2.Client) -> httpx2.Response:
    return http.post("/files", files={"file": ("a.jsonl", chat_rows(200))}, data={"purpose": "fine-tune"})


def assert_no_room(reply: httpx2.Response) -> None:
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["type"]) == (507, "storage_full", "server_error"), error
    assert reply.headers["x-should-retry"] == "false"
    assert "operator" in error["message"]

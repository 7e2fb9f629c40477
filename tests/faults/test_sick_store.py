"""An S3 server that answers 503, 507, slowly, or with half a body, under a running job and under clients.

A store that is not there at all, of either kind, is in test_store.py.
"""

import os
from collections.abc import Iterator

import httpx2
import pytest

from app.core.storage.blobs import read_bytes
from tests.support.backends import BACKEND
from tests.support.http import chat_rows
from tests.support.proxies import Mode, StoreProxy
from tests.support.running import SECONDS, Running
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(300)]
MODES = ("503", "507", "slow", "half")


@pytest.fixture
def store() -> Iterator[StoreProxy]:
    """The line to the S3 server, well at first."""
    if not BACKEND.is_production:
        pytest.skip("a folder answers nothing; see test_store.py and test_disk.py")
    BACKEND.new_blobs()
    proxy = StoreProxy(os.environ["AWS_ENDPOINT"])
    yield proxy
    proxy.close()


def all_blobs_are_whole(service: Running) -> bool:
    """Whether each blob there is can be read to its end."""
    blobs = service.scene.blobs
    return all(len(read_bytes(blobs, blob.key)) == blob.size_bytes for blob in blobs.list(""))


@pytest.mark.parametrize("mode", MODES)
def test_a_store_in_trouble_costs_a_running_job_time(service: Running, store: StoreProxy, mode: Mode) -> None:
    """Checkpoints and results that the store does not take are made again; the job does not fail, nor its worker."""
    service.start_reaper()
    worker = service.start_worker(step_seconds=0.05, env={"AWS_ENDPOINT": store.url})
    job_id = service.submit()
    service.wait_for_checkpoint(job_id)
    waiting = service.submit(steps=10)
    store.turn(mode)
    try:
        if mode == "slow":
            service.assert_ends_as_ever(job_id)
            assert service.scene.job(job_id).fence == 1
        else:
            wait_until(lambda: service.scene.job(job_id).rests > 0, seconds=SECONDS)
    finally:
        store.turn("well")
    service.assert_ends_as_ever(job_id)
    service.assert_ends_as_ever(waiting, steps=10)
    assert all_blobs_are_whole(service)
    assert worker.is_alive


@pytest.mark.parametrize("mode", MODES)
def test_clients_are_told_of_a_store_in_trouble(service: Running, store: StoreProxy, mode: Mode) -> None:
    """503 or 507 with what to do, never half a file as a whole one; what was refused left nothing behind."""
    service.start_api(env={"AWS_ENDPOINT": store.url})
    kept = service.upload()
    rows = chat_rows(30_000)
    with service.client(timeout=120.0) as http:
        before = http.get("/files").json()["data"]
        store.turn(mode)
        try:
            replies = [upload(http, chat_rows(12)), upload(http, rows), download(http, kept)]
        finally:
            store.turn("well")
        if mode == "slow":
            assert replies == [200, 200, 200]
            return
        assert replies == ([507, 507, 200] if mode == "507" else [503, 503, 503])  # what is full can be read
        assert http.get("/files").json()["data"] == before
        assert [upload(http, chat_rows(12)), upload(http, rows), download(http, kept)] == [200, 200, 200]
        names = [found["id"] for found in http.get("/files").json()["data"]]
        assert len(names) == len(before) + 2
        assert [download(http, name) for name in names] == [200] * len(names)
    assert all_blobs_are_whole(service)


def upload(http: httpx2.Client, rows: bytes) -> int:
    """The status of an upload, whose refusal is an envelope with what to do."""
    reply = http.post("/files", files={"file": ("a.jsonl", rows)}, data={"purpose": "fine-tune"})
    return assert_told(reply)


def download(http: httpx2.Client, file_id: str) -> int:
    """The status of a whole download; 503 also where it is broken off after it began, which a client cannot miss."""
    try:
        reply = http.get(f"/files/{file_id}/content")
    except httpx2.TransportError:
        return 503
    if reply.status_code == 200:
        assert len(reply.content) == int(reply.headers["Content-Length"])
    return assert_told(reply)


def assert_told(reply: httpx2.Response) -> int:
    """The reply's status; of a refusal only when its envelope says what to do."""
    if reply.status_code != 200:
        error = reply.json()["error"]
        code = {503: "storage_unavailable", 507: "storage_full"}[reply.status_code]
        assert (error["code"], error["type"], error["param"]) == (code, "server_error", None)
        assert len(error["message"]) > 20
        told = int(reply.headers["Retry-After"]) >= 1 if reply.status_code == 503 else reply.headers["x-should-retry"]
        assert told
    return reply.status_code

"""A running API for the whole test session, and a fresh project in it for each test."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx2
import pytest

from app.api.http.server import make_server
from app.core import models, projects
from app.core.jobs import ended, lease
from app.core.settings import EdgeSettings, LimitSettings, Settings
from app.core.storage.blobs import open_blobs, put_bytes
from app.core.storage.database import migrate, open_database
from app.core.storage.tables import Form
from app.main import build_app
from embedded import valkey
from tests.support.http import WORKER, Customer, Served, safety_report
from tests.support.jobs import QUICK
from worker.processes import StartedProgram


@pytest.fixture(scope="session")
def served(
    tmp_path_factory: pytest.TempPathFactory, broker_folder: Path, broker_process: StartedProgram
) -> Iterator[Served]:
    """The API over real HTTP, with its base aligned."""
    assert broker_process.is_alive
    settings = Settings(
        data=tmp_path_factory.mktemp("api"),
        broker_url=f"redis+socket://{broker_folder / valkey.SOCKET_NAME}",
        runtime=broker_folder,
        base="tiny",
        database_seconds=2.0,
        # no worker runs here: what the reaper would end or wake must stay as the tests drive it
        lease=QUICK.model_copy(update={"ttl_seconds": 600.0, "reaper_tick_seconds": 600.0}),
        limits=LimitSettings(live_jobs=15, file_bytes=2**20, json_body_bytes=128 * 2**10, rows_max=500),
        # all tests are one client with many keys, most of them wrong
        edge=EdgeSettings(wrong_keys_per_minute=100_000, requests_per_minute=10_000),
    )
    migrate(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    server = make_server(build_app(settings), settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    # the listener queues this until the app has started
    httpx2.get(f"{url}/readyz", timeout=30.0).raise_for_status()
    database = open_database(settings)
    opened = Served(url, settings, database, open_blobs(settings), projects.load_pepper(settings))
    align(opened)
    yield opened
    server.should_exit = True
    thread.join(timeout=30.0)
    database.close()


@pytest.fixture
def customer(served: Served) -> Iterator[Customer]:
    """A new project, so that lists and quotas begin empty."""
    yield from _customer(served)


@pytest.fixture
def stranger(served: Served) -> Iterator[Customer]:
    """Another tenant of the same service."""
    yield from _customer(served)


def _customer(served: Served) -> Iterator[Customer]:
    secret = projects.new_secret()
    with served.database.writing() as session:
        project = projects.ensure_project(session, f"project-{uuid4().hex}", policy="immunotune")
        projects.add_key(session, served.pepper, project, secret)
        session.commit()
    headers = {"Authorization": f"Bearer {secret}"}
    with httpx2.Client(base_url=f"{served.url}/v1", headers=headers, timeout=30.0, verify=False) as http:
        yield Customer(served, project, secret, http)


def align(served: Served) -> None:
    """Finish the align job that the API queued at start."""
    with served.database.writing() as session:
        job = models.get_alignment(session, "tiny")
        assert job is not None
        held = lease.claim(session, served.settings, job.id, WORKER)
        assert held is not None
        prefix = f"{held.prefix}/result"
        blob = put_bytes(served.blobs, f"{prefix}/alignment.zip", b"PK alignment")
        files = (ended.PublishedFile(Form.ALIGNMENT, "alignment.zip", blob),)
        summary: dict[str, object] = {"safety": safety_report(passed=True).model_dump(mode="json")}
        ended.finish(session, held, ended.Published(prefix, files, summary, 0))
        session.commit()

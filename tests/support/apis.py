"""A running API in this process, over real HTTP, and new projects in it."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import httpx2

from app.api.http.server import make_server
from app.core import models, projects
from app.core.jobs import ended, lease
from app.core.settings import Settings
from app.core.storage.blobs import open_blobs, put_bytes
from app.core.storage.database import migrate, open_database
from app.core.storage.tables import Form
from app.main import build_app
from tests.support.http import WORKER, Customer, Served, safety_report


@contextmanager
def serving(settings: Settings, *, alignment: bytes = b"PK alignment") -> Iterator[Served]:
    """The API of these settings, with its base aligned by what this zip holds."""
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
    align(opened, alignment)
    try:
        yield opened
    finally:
        server.should_exit = True
        thread.join(timeout=30.0)
        database.close()


def new_customer(served: Served) -> Iterator[Customer]:
    """A project of its own, and its key."""
    secret = projects.new_secret()
    with served.database.writing() as session:
        project = projects.ensure_project(session, f"project-{uuid4().hex}", policy="immunotune")
        projects.add_key(session, served.pepper, project, secret)
        session.commit()
    headers = {"Authorization": f"Bearer {secret}"}
    with httpx2.Client(base_url=f"{served.url}/v1", headers=headers, timeout=30.0, verify=False) as http:
        yield Customer(served, project, secret, http)


def align(served: Served, alignment: bytes) -> None:
    """Finish the align job that the API queued at start."""
    with served.database.writing() as session:
        job = models.get_alignment(session, "tiny")
        assert job is not None
        held = lease.claim(session, served.settings, job.id, WORKER)
        assert held is not None
        prefix = f"{held.prefix}/result"
        blob = put_bytes(served.blobs, f"{prefix}/alignment.zip", alignment)
        files = (ended.PublishedFile(Form.ALIGNMENT, "alignment.zip", blob),)
        summary: dict[str, object] = {"safety": safety_report(passed=True).model_dump(mode="json")}
        ended.finish(session, held, ended.Published(prefix, files, summary, 0))
        session.commit()

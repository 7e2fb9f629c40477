"""What one client may take of the API, with limits small enough to meet them."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from app.core.settings import EdgeSettings, Settings
from embedded import valkey
from tests.app.api.test_hostile_requests import FILE, PURPOSE, check_envelope, form
from tests.support.apis import new_customer, serving
from tests.support.http import Customer, Served
from tests.support.jobs import QUICK
from tests.support.waiting import wait_until
from worker.processes import StartedProgram

PIECE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="t.jsonl"\r\n\r\n'


@pytest.fixture(scope="module")
def tight(
    tmp_path_factory: pytest.TempPathFactory, broker_folder: Path, broker_process: StartedProgram
) -> Iterator[Served]:
    """An API that lends little."""
    assert broker_process.is_alive
    settings = Settings(
        data=tmp_path_factory.mktemp("tight"),
        broker_url=f"redis+socket://{broker_folder / valkey.SOCKET_NAME}",
        runtime=broker_folder,
        base="tiny",
        lease=QUICK.model_copy(update={"ttl_seconds": 600.0, "reaper_tick_seconds": 600.0}),
        edge=EdgeSettings(
            uploads=4, uploads_per_project=2, upload_wait_seconds=1.0, window_seconds=2.0, upload_seconds=6.0
        ),
    )
    with serving(settings) as opened:
        yield opened


@pytest.fixture
def one(tight: Served) -> Iterator[Customer]:
    yield from new_customer(tight)


@pytest.fixture
def other(tight: Served) -> Iterator[Customer]:
    yield from new_customer(tight)


@contextmanager
def begun_upload(customer: Customer) -> Iterator[socket.socket]:
    """A connection on which an upload has begun and does not end."""
    address = urlsplit(customer.served.url)
    with socket.create_connection((str(address.hostname), address.port or 0), timeout=30) as connection:
        head = (
            f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {customer.key}\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n"
        )
        connection.sendall(head.encode() + PIECE)
        yield connection


def test_slow_uploads_of_one_project_leave_places_to_others(one: Customer, other: Customer) -> None:
    """S5 b: a project that fills its places waits for itself; nobody else does."""
    with ExitStack() as held:
        for _ in range(6):
            held.enter_context(begun_upload(one))
        started = time.monotonic()
        assert other.upload(FILE[1]).status_code == 200
        assert time.monotonic() - started < 1.5  # before any of theirs is given up
    wait_until(lambda: one.upload(FILE[1]).status_code == 200, seconds=10)


def test_who_waits_too_long_for_a_place_may_come_again(one: Customer) -> None:
    """S5 b: the line has an end, too."""
    with ExitStack() as held:
        slow = [held.enter_context(begun_upload(one)) for _ in range(2)]
        stop = threading.Event()

        def keep_going() -> None:
            while not stop.wait(0.2):
                for connection in slow:
                    connection.sendall(b"x" * 1000)

        feeding = threading.Thread(target=keep_going)
        feeding.start()
        reply = one.upload(FILE[1])
        stop.set()
        feeding.join()
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "overloaded")
    assert reply.headers["retry-after"] == "5"


@pytest.mark.parametrize("kind", ["files", "fine_tuning/jobs"])
def test_a_dripping_body_is_given_up(one: Customer, kind: str) -> None:
    """S5 b: a body comes at 1 KiB/s over each window, or not at all; a byte now and then does not keep it open."""
    address = urlsplit(one.served.url)
    with socket.create_connection((str(address.hostname), address.port or 0), timeout=30) as connection:
        media = "application/json" if kind != "files" else "multipart/form-data; boundary=b"
        head = (
            f"POST /v1/{kind} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {one.key}\r\n"
            f"Content-Type: {media}\r\nContent-Length: 100000\r\n\r\n"
        )
        connection.sendall(head.encode() + PIECE)
        connection.settimeout(0.2)
        started, reply = time.monotonic(), b""
        while not reply and time.monotonic() - started < 20:
            connection.sendall(b" ")
            try:
                reply = connection.recv(65536)
            except TimeoutError:
                continue
    assert reply.startswith(b"HTTP/1.1 408")
    assert b'"code":"request_timeout"' in reply


def test_an_upload_has_a_time_in_all(one: Customer) -> None:
    """S5 b: who just meets the least rate does not hold a place for days."""
    with begun_upload(one) as connection:
        connection.settimeout(0.2)
        started, reply = time.monotonic(), b""
        while not reply and time.monotonic() - started < 25:
            connection.sendall(b"x" * 500)
            try:
                reply = connection.recv(65536)
            except TimeoutError:
                continue
    assert reply.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - started > 4


def test_a_form_that_is_refused_early_is_answered(one: Customer) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    body = form(PURPOSE, ('name="purpose"', b"x"), FILE)
    check_envelope(one.http.post("/files", content=body, headers=kind), 400, "invalid_request_body")

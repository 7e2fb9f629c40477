"""What one client may take of the API, with limits small enough to meet them."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import openai
import pytest

from app.core.settings import EdgeSettings, Settings
from tests.app.api.test_hostile_requests import FILE, PURPOSE, check_envelope, form
from tests.support.apis import new_customer, serving
from tests.support.backends import BACKEND
from tests.support.http import Customer, Served
from tests.support.jobs import QUICK
from tests.support.model_server import free_port
from tests.support.waiting import wait_until
from worker.processes import StartedProgram

PIECE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="t.jsonl"\r\n\r\n'


@pytest.fixture(scope="module")
def tight(
    tmp_path_factory: pytest.TempPathFactory, broker_folder: Path, broker_process: StartedProgram
) -> Iterator[Served]:
    """An API that lends little."""
    assert broker_process.is_alive
    data = tmp_path_factory.mktemp("tight")
    values = {
        "base": "tiny",
        "lease": QUICK.model_copy(update={"ttl_seconds": 600.0, "reaper_tick_seconds": 600.0}),
        "edge": EdgeSettings(
            uploads=4, uploads_per_project=2, upload_wait_seconds=1.0, window_seconds=2.0, upload_seconds=6.0
        ),
    }
    settings = Settings.model_validate(
        {"data": data, **BACKEND.storage(data), **BACKEND.broker(broker_folder), **values}
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
        try:
            replies: list[httpx2.Response] = []
            wait_until(lambda: replies.append(one.upload(FILE[1])) or replies[-1].status_code == 503, seconds=5)
        finally:
            stop.set()
            feeding.join()
    assert replies[-1].json()["error"]["code"] == "overloaded"
    assert replies[-1].headers["retry-after"] == "5"


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
    assert b"x-should-retry" not in reply.lower()


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
    assert b"x-should-retry: false" in reply.lower()  # review: the same file over the same line would end so again
    assert time.monotonic() - started > 4


def test_a_form_that_is_refused_early_is_answered(one: Customer) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    body = form(PURPOSE, ('name="purpose"', b"x"), FILE)
    check_envelope(one.http.post("/files", content=body, headers=kind), 400, "invalid_request_body")


@contextmanager
def api_of(settings: Settings, edge: EdgeSettings, folder: Path) -> Iterator[Customer]:
    """A project in an API of its own with these limits."""
    values = {"data": folder, "database_url": f"sqlite:///{folder}/own.db", "blob_url": (folder / "blobs").as_uri()}
    own = settings.model_copy(update={**values, **BACKEND.storage(folder), "edge": edge})
    with serving(own) as served:
        customers = new_customer(served)
        yield next(customers)
        customers.close()


def test_a_key_has_so_many_requests_a_minute(tight: Served, tmp_path: Path) -> None:
    """S11: every reply says what is left; too many are refused with the time to wait, and no other key suffers."""
    with api_of(tight.settings, EdgeSettings(requests_per_minute=20), tmp_path) as customer:
        first = customer.http.get("/files").headers
        assert (first["x-ratelimit-limit-requests"], first["x-ratelimit-remaining-requests"]) == ("20", "19")
        assert float(first["x-ratelimit-reset-requests"].removesuffix("s")) > 0
        replies = [customer.http.get("/files") for _ in range(30)]
        refused = [reply for reply in replies if reply.status_code == 429]
        assert 5 < len(refused) <= 11
        error = refused[0].json()["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert 1 <= int(refused[0].headers["retry-after"]) <= 60
        assert 0 < int(refused[0].headers["retry-after-ms"]) <= 60_000
        assert refused[0].headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(openai.RateLimitError):
            for _ in range(5):
                customer.sdk.models.list()
        others = new_customer(customer.served)
        assert next(others).http.get("/files").status_code == 200
        others.close()


def test_who_guesses_keys_must_wait_and_others_need_not(tight: Served, tmp_path: Path) -> None:
    """S11, review: an address that sent many wrong keys is told to wait; whoever has a right one never is.

    Behind a proxy all have one address, and the keys that a process had not seen yet were locked out with the guesser.
    """
    with api_of(tight.settings, EdgeSettings(wrong_keys_per_minute=5), tmp_path) as customer:
        assert customer.http.get("/files").status_code == 200

        def ask(key: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            return httpx2.get(f"{customer.served.url}/v1/files", headers=headers, verify=False).status_code

        found = [ask(f"sk-proj-{number}") for number in range(12)]
        assert found[:5] == [401] * 5
        assert found[-4:] == [429] * 4
        others = new_customer(customer.served)
        assert ask(next(others).key) == 200
        others.close()
        assert customer.http.get("/files").status_code == 200


def test_metrics_have_an_address_of_their_own(tight: Served, tmp_path: Path) -> None:
    """S26: clients do not reach the counters; where the operator says, they are served."""
    port = free_port()
    with api_of(tight.settings, EdgeSettings(metrics_port=port), tmp_path) as customer:
        assert httpx2.get(f"{customer.served.url}/metrics", verify=False).status_code == 404
        reply = httpx2.get(f"http://127.0.0.1:{port}/metrics")
        assert reply.status_code == 200
        assert "immunotune_jobs_queued" in reply.text
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}/metrics")


def test_an_unknown_host_is_refused(tight: Served, one: Customer, tmp_path: Path) -> None:
    """S26: on a loopback address only its own names are ours; elsewhere those that the operator lists."""
    for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "[::2]:80", ""):
        check_envelope(one.http.get("/files", headers={"Host": host}), 400, "invalid_value", "host")
    for host in ("localhost", "LOCALHOST:1234", "[::1]:80", "127.0.0.1"):
        assert one.http.get("/files", headers={"Host": host}).status_code == 200
    assert httpx2.get(f"{tight.url}/healthz", headers={"Host": "10.0.0.1"}).status_code == 200
    with api_of(tight.settings, EdgeSettings(allowed_hosts=("api.example",)), tmp_path) as customer:
        assert customer.http.get("/files", headers={"Host": "API.example:443"}).status_code == 200
        check_envelope(customer.http.get("/files"), 400, "invalid_value", "host")

"""The model server is killed or stands still: chat ends in time with an error, all else goes on, and it recovers."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from app.core.settings import ServingSettings, Settings
from tests.support.apis import new_customer, serving
from tests.support.backends import BACKEND
from tests.support.http import Customer
from tests.support.jobs import QUICK
from tests.support.model_server import SECRET, free_port, model_server
from tests.support.processes import suspended
from tests.support.tiny_llama import save_adapter, save_base, zip_adapter
from worker.processes import StartedProgram

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(300)]
HI = [{"role": "user", "content": "how do I mix a soup?"}]
CHAT_SECONDS = 6.0


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    (data / "blobs").mkdir(parents=True)
    return data


@pytest.fixture
def port() -> int:
    """Where the model server is, whenever there is one."""
    return free_port()


@pytest.fixture
def customer(
    base: Path, data: Path, port: int, broker_folder: Path, broker_process: StartedProgram, tmp_path: Path
) -> Iterator[Customer]:
    """A customer of an API in front of that port."""
    assert broker_process.is_alive
    values = {
        "base": "tiny",
        "model_server_urls": (f"http://127.0.0.1:{port}",),
        "model_server_secret": SECRET,
        "serving": ServingSettings(chat_seconds=CHAT_SECONDS, ping_seconds=0.5),
        "lease": QUICK.model_copy(update={"ttl_seconds": 600.0, "reaper_tick_seconds": 600.0}),
    }
    settings = Settings.model_validate(
        {"data": data, **BACKEND.storage(data), **BACKEND.broker(broker_folder), **values}
    )
    alignment = zip_adapter(save_adapter(base, tmp_path / "alignment", seed=1), tmp_path / "alignment.zip")
    with serving(settings, alignment=alignment) as served:
        yield from new_customer(served)


def ask(customer: Customer, **fields: object) -> httpx2.Response:
    return customer.http.post("/chat/completions", json={"model": "tiny", "messages": HI, "max_tokens": 4, **fields})


def last_event(events: Iterator[str]) -> str:
    """The code of the error with which a stream ends."""
    said = [line.removeprefix("data: ") for line in events if line.startswith("data: ")]
    assert "[DONE]" not in said
    return str(json.loads(said[-1])["error"]["code"])


def assert_the_rest_goes_on(customer: Customer) -> None:
    begin = time.monotonic()
    assert customer.http.get("/fine_tuning/jobs").status_code == 200
    assert httpx2.get(f"{customer.served.url}/healthz", verify=False).status_code == 200
    assert time.monotonic() - begin < 2.0


def test_a_model_server_that_is_killed_or_stands_still_costs_its_answers_only(
    customer: Customer, base: Path, data: Path, port: int
) -> None:
    """A stream ends with an error line, an answer is refused in time, and chat is back when the server is."""
    long = {"model": "tiny", "messages": HI, "max_tokens": 3000, "stream": True, "temperature": 0}
    with model_server(base, data, port=port) as server:
        assert ask(customer).status_code == 200
        with customer.http.stream("POST", "/chat/completions", json=long) as stream:
            events = stream.iter_lines()
            assert next(events).startswith("data: ")
            with suspended(server.process.pid):
                assert last_event(events) == "request_timeout"
                begin = time.monotonic()
                late = ask(customer)
                assert (late.status_code, late.json()["error"]["code"]) == (408, "request_timeout")
                assert time.monotonic() - begin < CHAT_SECONDS + 5.0
                assert_the_rest_goes_on(customer)
        assert ask(customer).status_code == 200
        with customer.http.stream("POST", "/chat/completions", json=long) as stream:
            events = stream.iter_lines()
            assert next(events).startswith("data: ")
            server.process.kill()
            assert last_event(events) == "model_server_lost"
    begin = time.monotonic()
    refused = ask(customer)
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
    assert int(refused.headers["Retry-After"]) >= 1
    assert time.monotonic() - begin < 5.0
    assert_the_rest_goes_on(customer)
    with model_server(base, data, port=port):
        assert ask(customer).status_code == 200

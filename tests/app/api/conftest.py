"""A running API for the whole test session, and a fresh project in it for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.settings import EdgeSettings, LimitSettings, Settings
from tests.support.apis import new_customer, serving
from tests.support.backends import BACKEND
from tests.support.http import Customer, Served
from tests.support.jobs import QUICK
from worker.processes import StartedProgram


@pytest.fixture(scope="session")
def served(
    tmp_path_factory: pytest.TempPathFactory, broker_folder: Path, broker_process: StartedProgram
) -> Iterator[Served]:
    """The API over real HTTP, with its base aligned."""
    assert broker_process.is_alive
    values = {
        "base": "tiny",
        "database_seconds": 2.0,
        # no worker runs here: what the reaper would end or wake must stay as the tests drive it
        "lease": QUICK.model_copy(update={"ttl_seconds": 600.0, "reaper_tick_seconds": 600.0}),
        "limits": LimitSettings(live_jobs=15, file_bytes=2**20, json_body_bytes=128 * 2**10, rows_max=500),
        # all tests are one client with many keys, most of them wrong
        "edge": EdgeSettings(wrong_keys_per_minute=100_000, requests_per_minute=10_000),
    }
    data = tmp_path_factory.mktemp("api")
    settings = Settings.model_validate(
        {"data": data, **BACKEND.storage(data), **BACKEND.broker(broker_folder), **values}
    )
    with serving(settings) as opened:
        yield opened


@pytest.fixture
def customer(served: Served) -> Iterator[Customer]:
    """A new project, so that lists and quotas begin empty."""
    yield from new_customer(served)


@pytest.fixture
def stranger(served: Served) -> Iterator[Customer]:
    """Another tenant of the same service."""
    yield from new_customer(served)

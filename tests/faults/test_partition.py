"""The line between worker and database alone breaks: the rest of the service sees a worker that says nothing."""

from collections.abc import Iterator
from typing import Literal

import pytest
from sqlalchemy import make_url

from tests.support.backends import BACKEND
from tests.support.processes import is_gone
from tests.support.proxies import TcpProxy
from tests.support.running import SECONDS, Running
from tests.support.waiting import wait_until
from worker.processes import stop

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def line(service: Running) -> Iterator[TcpProxy]:
    """A line to this service's database."""
    if not BACKEND.is_production:
        pytest.skip("SQLite is a file: no line to it can break")
    url = make_url(service.scene.settings.database_url)
    proxy = TcpProxy((str(url.host), int(url.port or 0)))
    yield proxy
    proxy.close()


@pytest.mark.parametrize("fault", ["cut", "silent"])
def test_a_worker_without_its_database_lets_go_and_comes_back_as_nobody(
    service: Running, line: TcpProxy, fault: Literal["cut", "silent"]
) -> None:
    """Its training process ends before another has the job; when the line is well again it takes jobs as before."""
    service.start_reaper()
    url = make_url(service.scene.settings.database_url).set(host="127.0.0.1", port=line.port)
    behind = {"IMMUNOTUNE_DATABASE_URL": url.render_as_string(hide_password=False)}
    first = service.start_worker(step_seconds=0.2, env=behind)
    job_id = service.submit()
    training = service.wait_for_checkpoint(job_id)
    line.turn(fault)
    wait_until(lambda: is_gone(training), seconds=service.scene.settings.lease.ttl_seconds)
    assert service.scene.job(job_id).fence == 1
    assert line.held
    second = service.start_worker()
    service.assert_ends_as_ever(job_id)
    assert service.scene.job(job_id).fence == 2
    line.turn("well")
    stop([second])
    after = service.submit(steps=10)
    wait_until(lambda: service.scene.job(after).fence == 1, seconds=SECONDS)
    service.assert_ends_as_ever(after, steps=10)
    assert first.is_alive

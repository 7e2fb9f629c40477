"""The database's clock jumps an hour under running processes: whatever was stored lies elsewhere from then on.

The clock itself cannot be set here, so every stored time is moved the other way, which is the same to whoever compares.
"""

import pytest
from sqlalchemy import Double, inspect, update

from app.core.storage.database import Database, TableRow
from app.core.storage.job_states import JobState
from tests.support.running import SECONDS, Running
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(300)]
HOUR = 3600.0


def jump(database: Database, seconds: float) -> None:
    """The clock goes forward by so much, or back: every time in every table is that much further off."""
    with database.writing() as session:
        for table in TableRow.__subclasses__():
            columns = [column for column in inspect(table).columns if isinstance(column.type, Double)]
            times = [column for column in columns if column.key.endswith(("_at", "_until", "_after"))]
            session.execute(update(table).values({column.key: column - seconds for column in times}))
        session.commit()


@pytest.mark.parametrize("hours", [-1, 1], ids=["back", "forward"])
def test_a_clock_that_jumps_costs_a_running_and_a_waiting_job_time(service: Running, hours: int) -> None:
    """A live job may be taken back at worst; both end, without a loss of their own, with the same bytes."""
    service.start_reaper()
    service.start_worker(step_seconds=0.1)
    job_id = service.submit()
    service.wait_for_checkpoint(job_id)
    waiting = service.submit(steps=10)
    jump(service.scene.database, hours * HOUR)
    service.assert_ends_as_ever(job_id)
    service.assert_ends_as_ever(waiting, steps=10)
    assert service.scene.job(job_id).fence <= 2


def test_a_dead_workers_job_is_taken_back_though_the_clock_went_back(service: Running) -> None:
    """Its lease seems to end in an hour; another worker has it long before."""
    service.start_reaper()
    worker = service.start_worker()
    job_id = service.submit()
    service.wait_for_checkpoint(job_id)
    worker.process.kill()
    jump(service.scene.database, -HOUR)
    wait_until(lambda: service.scene.job(job_id).state == JobState.QUEUED, seconds=SECONDS)
    service.start_worker()
    service.assert_ends_as_ever(job_id)

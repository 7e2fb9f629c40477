"""What the reaper does to jobs under way; a clock that jumps is a database whose stored times all lie elsewhere."""

import pytest
from sqlalchemy import select, update

from app.core.broker import Wake
from app.core.errors import LeaseLost
from app.core.jobs import ended, expiry, lease
from app.core.jobs.ended import ReleaseCause
from app.core.jobs.lease import Beat, Lease
from app.core.settings import Settings
from app.core.storage.database import Database, read_clock
from app.core.storage.tables import BaseRow, Job, Project
from tests.support.jobs import add_job, patient

HOUR = 3600.0


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return patient(settings)


def age(database: Database, **columns: float) -> None:
    """Move stored times of all jobs into the past by so many seconds."""
    with database.writing() as session:
        values = {name: getattr(Job, name) - seconds for name, seconds in columns.items()}
        session.execute(update(Job).values(values))
        session.commit()


def clock_back(database: Database, seconds: float) -> None:
    """The database's clock goes back by so much: whatever was stored lies that much further ahead."""
    times = ("lease_until", "run_after", "woken_at", "saved_at", "progress_at", "created_at", "started_at")
    age(database, **dict.fromkeys(times, -seconds))


def claimed(database: Database, settings: Settings, job: Job, worker_id: str = "w") -> Lease:
    held = claim(database, settings, job, worker_id)
    assert held is not None
    return held


def claim(database: Database, settings: Settings, job: Job, worker_id: str = "w") -> Lease | None:
    with database.writing() as session:
        held = lease.claim(session, settings, job.id, worker_id)
        session.commit()
    return held


def beat(database: Database, settings: Settings, held: Lease, news: Beat | None = None) -> None:
    with database.writing() as session:
        lease.beat(session, settings.lease, held, news or Beat(), worker_id="w")
        session.commit()


def expire(database: Database, settings: Settings) -> tuple[Wake, ...]:
    with database.writing() as session:
        wakes = expiry.expire(session, settings.lease)
        session.commit()
    return wakes


def now_of(database: Database, job: Job) -> Job:
    with database.reading() as session:
        return session.scalars(select(Job).where(Job.id == job.id)).one()


def test_a_live_lease_is_left_alone(database: Database, settings: Settings, project: Project, base: BaseRow) -> None:
    job = add_job(database, project, settings)
    claimed(database, settings, job)
    assert expire(database, settings) == ()
    assert now_of(database, job).state == "running"


def test_a_lease_that_ran_out_is_the_loss_of_a_host(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S1, S12: a host that is preempted or asleep three times during the screen fails no job."""
    job = add_job(database, project, settings)
    for times in range(1, 8):
        age(database, run_after=600)
        claimed(database, settings, job)
        age(database, lease_until=600)
        assert expire(database, settings) == ()
        assert expire(database, settings) == ()
        found = now_of(database, job)
        assert (found.state, found.losses, found.host_losses, found.avoid_worker) == ("queued", 0, times, "w")
        assert found.woken_at is None


def test_hosts_without_number_end_a_job(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S1: the ceiling of a real poison."""
    job = add_job(database, project, settings)
    waiting = add_job(database, project, settings)
    for _ in range(settings.lease.max_host_losses):
        age(database, run_after=600)
        claimed(database, settings, job)
        age(database, lease_until=600)
        wakes = expire(database, settings)
    found = now_of(database, job)
    assert (found.state, (found.error or {})["code"]) == ("failed", "hosts_lost")
    assert wakes == (Wake("immunotune.run_job", waiting.id, "train.cpu"),)


def test_a_checkpoint_forgives_lost_hosts(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S1: each kind of loss counts since the last checkpoint."""
    job = add_job(database, project, settings)
    claimed(database, settings, job)
    age(database, lease_until=600)
    expire(database, settings)
    age(database, run_after=600)
    held = claimed(database, settings, job)
    beat(database, settings, held, Beat(checkpoints=(lease.SavedCheckpoint(20, "x", "print", {}),)))
    assert now_of(database, job).host_losses == 0


def test_a_clock_that_goes_back_takes_no_live_job_and_keeps_no_dead_one(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S12: a lease that ends an hour ahead was believed for an hour."""
    alive, dead = add_job(database, project, settings), add_job(database, project, settings)
    held = claimed(database, settings, alive)
    claimed(database, settings, dead)
    clock_back(database, HOUR)
    expire(database, settings)
    assert {now_of(database, job).state for job in (alive, dead)} == {"running"}
    with database.reading() as session:
        left = (now_of(database, dead).lease_until or 0) - read_clock(session)
    assert left <= settings.lease.ttl_seconds
    age(database, lease_until=settings.lease.ttl_seconds)  # one lease's time goes by, in which who lives beats
    beat(database, settings, held)
    expire(database, settings)
    assert [now_of(database, job).state for job in (alive, dead)] == ["running", "queued"]
    assert now_of(database, alive).host_losses == 0


def test_a_clock_that_goes_back_keeps_no_queued_job_waiting(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S12: neither its rest nor its last wake-up lies in the future."""
    job = add_job(database, project, settings)
    clock_back(database, HOUR)
    assert claim(database, settings, job) is None
    expire(database, settings)
    assert now_of(database, job).woken_at is None
    assert claim(database, settings, job) is not None


def test_a_clock_that_goes_forward_charges_no_job(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S12: a laptop that slept for an hour finds its jobs lost, and not their fault."""
    job = add_job(database, project, settings)
    for _ in range(4):
        clock_back(database, -600)
        held = claimed(database, settings, job)
        clock_back(database, -HOUR)
        expire(database, settings)
        with pytest.raises(LeaseLost):
            beat(database, settings, held)
    assert (now_of(database, job).state, now_of(database, job).losses) == ("queued", 0)


def test_figures_that_move_are_life(database: Database, settings: Settings, project: Project, base: BaseRow) -> None:
    """S30: a screen of 200,000 rows saves nothing for hours, and is not failed for it."""
    job = add_job(database, project, settings)
    held = claimed(database, settings, job)
    age(database, saved_at=settings.lease.stall_seconds + 1, progress_at=settings.lease.stall_seconds + 1)
    beat(database, settings, held, Beat(stage="screen", progress={"done": 1}, advanced=True))
    expire(database, settings)
    assert now_of(database, job).state == "running"


def test_figures_that_stand_still_are_none(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S30: a process that hangs is lost like one that ends, and three times end the job."""
    job = add_job(database, project, settings)
    for losses in (1, 2, 3):
        held = claimed(database, settings, job)
        age(database, progress_at=settings.lease.stall_seconds + 1)
        beat(database, settings, held, Beat(progress={"done": 1}))
        expire(database, settings)
        found = now_of(database, job)
        assert found.losses == losses
        with pytest.raises(LeaseLost):
            beat(database, settings, held)
        age(database, run_after=600)
    assert (found.state, (found.error or {})["code"]) == ("failed", "job_stalled")


def test_a_stage_may_be_given_more_time(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S30: a gate with a slow judge may be silent for longer than a step."""
    changed = settings.lease.model_copy(update={"stall_seconds_of": {"gate": 10 * HOUR}})
    lenient = settings.model_copy(update={"lease": changed})
    job = add_job(database, project, settings)
    held = claimed(database, settings, job)
    beat(database, settings, held, Beat(stage="gate"))
    age(database, progress_at=5 * HOUR)
    expire(database, lenient)
    assert now_of(database, job).state == "running"
    beat(database, settings, held, Beat(stage="train"))
    age(database, progress_at=5 * HOUR)
    expire(database, lenient)
    assert now_of(database, job).state == "queued"


@pytest.mark.parametrize("cause", [ReleaseCause.HOST, ReleaseCause.STORAGE, ReleaseCause.UNFIT])
def test_who_lost_a_job_leaves_it_to_others_for_a_while(
    database: Database, settings: Settings, project: Project, base: BaseRow, cause: ReleaseCause
) -> None:
    """S1: not to the same worker again at once, where others exist; and its message goes on to them."""
    with database.writing() as session:
        mine, other = (
            lease.enrol_worker(session, host=name, devices="cpu", queues=queues)
            for name, queues in (("a", ["train.cpu"]), ("b", ["checks", "train.cpu"]))
        )
        session.commit()
    job = add_job(database, project, settings)
    held = claimed(database, settings, job, mine)
    with database.writing() as session:
        ended.release(session, settings.lease, held, cause, message="it could not begin")
        session.execute(update(Job).values(run_after=0.0))
        session.commit()
    assert claim(database, settings, job, mine) is None
    with database.reading() as session:
        wakes = [lease.wakes_for_others(session, settings.lease, job.id, worker) for worker in (mine, other)]
    assert wakes == [(Wake("immunotune.run_job", job.id, "train.cpu"),), ()]
    age(database, avoid_until=HOUR)  # they are all busy
    assert claim(database, settings, job, mine) is not None


@pytest.mark.parametrize(
    ("queues", "seen_ago"), [(["checks"], 0.0), (["train.gpu24"], 0.0), (["train.cpu"], 900.0), (["train.cpu"], -900.0)]
)
def test_who_lost_a_job_takes_it_again_where_nobody_else_is(
    database: Database, settings: Settings, project: Project, base: BaseRow, queues: list[str], seen_ago: float
) -> None:
    """S1: a worker of other queues, or one that has not been heard of, is nobody."""
    with database.writing() as session:
        mine = lease.enrol_worker(session, host="a", devices="cpu", queues=["train.cpu"])
        other = lease.enrol_worker(session, host="b", devices="cpu", queues=queues)
        table = lease.Worker
        session.execute(update(table).where(table.id == other).values(seen_at=table.seen_at - seen_ago))
        session.commit()
    job = add_job(database, project, settings)
    held = claimed(database, settings, job, mine)
    with database.writing() as session:
        ended.release(session, settings.lease, held, ReleaseCause.HOST, message="it could not begin")
        session.execute(update(Job).values(run_after=0.0))
        session.commit()
    assert claim(database, settings, job, mine) is not None

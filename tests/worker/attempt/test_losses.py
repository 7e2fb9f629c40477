"""Faults of a host or a store cost a job time and never its outcome; what is the job's own ends it."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import make_url, select, update

from app.core.broker import Wake
from app.core.jobs.lease import enrol_worker
from app.core.jobs.waiting import count_baseless
from app.core.jobs.workers import count_resting
from app.core.storage.blobs import put_bytes, read_bytes
from app.core.storage.blobs.folder import FolderBlobs
from app.core.storage.database import open_database, read_clock
from app.core.storage.job_states import JobState
from app.core.storage.tables import BaseRow, BaseStatus, Form, Worker
from finetuning.contract.recipe import JobKind
from tests.support.backends import BACKEND, run_sql
from tests.support.sick_store import SickStore
from tests.support.waiting import wait_until
from tests.support.worlds import FAST, Scene, open_scene, recipe, scripted, settings_in
from worker import presence
from worker.attempt.launch import Launch, Launcher, Mode
from worker.attempt.supervisor import Host, supervise

# rests are over before the next round
HASTY = FAST.model_copy(update={"rewake_seconds": 0.01, "rest_seconds": 0.01})


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    opened = open_scene(settings_in(tmp_path / "data", lease=HASTY))
    yield opened
    opened.database.close()


def with_lease(scene: Scene, **changes: object) -> Scene:
    lease = scene.settings.lease.model_copy(update=changes)
    return replace(scene, settings=scene.settings.model_copy(update={"lease": lease}))


def without_program(sick: Path) -> Launcher:
    """The stand-in's launcher; while `sick` exists its program does not."""
    well = scripted()

    def launch(scratch: Path, mode: Mode) -> Launch:
        found = well(scratch, mode)
        return replace(found, argv=("/nowhere/python", *found.argv[1:])) if sick.exists() else found

    return launch


def sick_host(scene: Scene, fault: str, sick: Path) -> Host:
    """A worker on which this fault lasts for as long as the file `sick` exists."""
    store = SickStore(scene.blobs, lambda key: sick.exists() and fault == f"store of {key.split('/')[0]}")
    script: dict[str, dict[str, object]] = {
        "dies before it begins": {"exit_while": str(sick)},
        "killed": {"die_at": 5, "die_while": str(sick)},
    }
    launcher = without_program(sick) if fault == "no program" else scripted(**script.get(fault, {}))
    return replace(scene.host(launcher), blobs=store)


def work_until_done(scene: Scene, host: Host, jobs: list[str]) -> None:
    """What messages do: try every job until all have ended."""

    def all_ended() -> bool:
        for job_id in jobs:
            supervise(host, job_id)
        return all(scene.job(job_id).finished_at is not None for job_id in jobs)

    wait_until(all_ended, seconds=90)


@pytest.mark.parametrize("fault", ["store of files", "store of jobs", "no program", "dies before it begins", "killed"])
def test_what_a_host_or_store_does_wrong_fails_no_job(scene: Scene, tmp_path: Path, fault: str) -> None:
    """S1: five queued jobs on a host or a store that fails; all five end well once that is over."""
    sick = tmp_path / "sick"
    sick.touch()
    host = sick_host(scene, fault, sick)
    jobs = [scene.add_job(recipe(steps=10)) for _ in range(5)]
    for _ in range(3):
        for job_id in jobs:
            supervise(host, job_id)
    assert {scene.job(job_id).state for job_id in jobs} == {JobState.QUEUED}
    sick.unlink()
    work_until_done(scene, host, jobs)
    assert {scene.job(job_id).state for job_id in jobs} == {JobState.SUCCEEDED}
    assert {scene.job(job_id).losses for job_id in jobs} == {0}


def test_a_sick_host_does_not_end_the_alignment_nor_who_waits_for_it(tmp_path: Path) -> None:
    """S1: the base stays to come, so no fine-tune that waits for it is failed."""
    opened = open_scene(settings_in(tmp_path / "data", lease=HASTY), base_status=BaseStatus.ALIGNING)
    scene = with_lease(opened, max_host_losses=2)
    sick = tmp_path / "sick"
    sick.touch()
    host = sick_host(scene, "dies before it begins", sick)
    waiting, aligning = scene.add_job(recipe()), scene.add_job(recipe(kind=JobKind.ALIGN))

    def lost_often() -> bool:
        supervise(host, aligning)
        return scene.job(aligning).host_losses > 4 or scene.job(aligning).state == JobState.FAILED

    wait_until(lost_often, seconds=60)
    with scene.database.writing() as session:
        count_baseless(session)
        session.commit()
        assert session.scalars(select(BaseRow.status)).one() == BaseStatus.ALIGNING
    assert scene.job(waiting).state == JobState.QUEUED
    sick.unlink()
    work_until_done(scene, host, [aligning])
    work_until_done(scene, host, [waiting])
    assert [scene.job(job_id).state for job_id in (aligning, waiting)] == [JobState.SUCCEEDED] * 2
    scene.database.close()


def test_a_job_that_takes_its_hosts_along_ends_at_a_ceiling_of_its_own(scene: Scene) -> None:
    """S1: a real poison ends, later than a job's own faults and with another code."""
    scene = with_lease(scene, max_host_losses=5)
    job_id = scene.add_job(recipe())
    work_until_done(scene, scene.host(scripted(die_at=5)), [job_id])
    job = scene.job(job_id)
    assert job.error is not None
    assert (job.state, job.error["code"], job.losses, job.host_losses) == (JobState.FAILED, "hosts_lost", 0, 5)
    assert "5 times" in str(job.error["message"])


def test_a_worker_that_fails_in_a_row_stops_claiming_and_says_so(scene: Scene, tmp_path: Path) -> None:
    """S1: the circuit breaker; what the worker lost after another job is not counted for a job."""
    scene = with_lease(scene, rest_seconds=600.0)
    sick = tmp_path / "sick"
    sick.touch()
    host = sick_host(scene, "no program", sick)
    jobs = [scene.add_job(recipe()) for _ in range(5)]
    for job_id in jobs:
        supervise(host, job_id)
    assert [scene.job(job_id).fence for job_id in jobs] == [1, 1, 1, 0, 0]
    assert [scene.job(job_id).host_losses for job_id in jobs] == [1, 0, 0, 0, 0]
    with scene.database.reading() as session:
        worker = session.scalars(select(Worker)).one()
        assert (worker.faults, count_resting(session)) == (3, 1)
    restarted = scene.host(scripted())
    supervise(restarted, jobs[3])
    assert scene.job(jobs[3]).state == JobState.SUCCEEDED
    with scene.database.reading() as session:
        worker = session.scalars(select(Worker)).one()
        assert (worker.faults, worker.resting_until) == (0, None)


def test_work_that_begins_sets_the_breaker_back(scene: Scene, tmp_path: Path) -> None:
    """S1: a job here and there that is lost early does not stop a worker that works."""
    sick = tmp_path / "sick"
    host = sick_host(with_lease(scene, rest_seconds=600.0), "no program", sick)
    for _ in range(4):
        sick.touch()
        supervise(host, scene.add_job(recipe(steps=10)))
        sick.unlink()
        done = scene.add_job(recipe(steps=10))
        supervise(host, done)
        assert scene.job(done).state == JobState.SUCCEEDED
    assert host.breaker.rest_seconds == 0


def test_a_checkpoint_that_the_store_does_not_take_costs_nothing_else(scene: Scene) -> None:
    """S1: it is skipped, the next one is stored, and the training process lives on."""
    job_id = scene.add_job(recipe(steps=40))
    store = SickStore(scene.blobs, lambda key: "/checkpoints/10/" in key or "/checkpoints/30/" in key)
    supervise(replace(scene.host(scripted()), blobs=store), job_id)
    job = scene.job(job_id)
    assert (job.state, job.fence, job.losses) == (JobState.SUCCEEDED, 1, 0)
    assert scene.checkpoints(job_id) == [(20, 1)]
    assert "The checkpoint at step 10 was not kept: the store did not take it" in scene.messages(job_id)


@pytest.mark.parametrize("status", [7, 0])
def test_what_a_job_does_to_itself_still_ends_it(scene: Scene, status: int) -> None:
    """S1: a process that ends by its own status after its work began counts, and the third time is the last."""
    job_id = scene.add_job(recipe())
    work_until_done(scene, scene.host(scripted(exit_at=5, exit_status=status)), [job_id])
    job = scene.job(job_id)
    assert job.error is not None
    assert (job.error["code"], job.losses, job.fence) == ("worker_crashed", 3, 3)


@pytest.mark.parametrize(("status", "counted"), [(143, (1, 0)), (145, (0, 1))])
def test_a_status_that_blames_the_host_is_no_loss_of_the_job(
    scene: Scene, status: int, counted: tuple[int, int]
) -> None:
    """S1: a stop from outside; a full disk or a judge that does not answer, which twenty times ended a job (review)."""
    job_id = scene.add_job(recipe())
    supervise(scene.host(scripted(exit_at=5, exit_status=status)), job_id)
    job = scene.job(job_id)
    assert (job.state, job.losses, (job.host_losses, job.rests)) == (JobState.QUEUED, 0, counted)


def test_what_the_operator_set_up_wrongly_fails_no_job(scene: Scene) -> None:
    """S1: a judge whose key has run out ended every job at once."""
    job_id = scene.add_job(recipe())
    supervise(scene.host(scripted(failed="host_unfit")), job_id)
    assert (scene.job(job_id).state, scene.job(job_id).error) == (JobState.QUEUED, None)
    assert (scene.job(job_id).host_losses, scene.job(job_id).rests) == (0, 1)
    supervise(scene.host(scripted()), job_id)
    assert scene.job(job_id).state == JobState.SUCCEEDED


def test_a_volume_that_is_not_mounted_is_no_loss_and_condemns_no_checkpoint(scene: Scene, tmp_path: Path) -> None:
    """S1, S10 (review): an empty folder misses every blob, and was taken for a job whose own are gone."""
    job_id, resumed = (scene.add_job(recipe(steps=40)) for _ in range(2))
    supervise(scene.host(scripted(die_at=25)), resumed)
    saved, counted = scene.checkpoints(resumed), scene.job(resumed).host_losses
    unmounted = replace(scene.host(scripted()), blobs=FolderBlobs(tmp_path / "unmounted", free_bytes=0))
    for lost in (job_id, resumed):
        supervise(unmounted, lost)
    assert (scene.job(job_id).host_losses, scene.job(job_id).rests) == (0, 1)
    assert (scene.job(resumed).host_losses, scene.job(resumed).rests) == (counted, 1)
    work_until_done(scene, scene.host(scripted()), [job_id, resumed])
    assert not [told for told in scene.messages(resumed) if "cannot be used" in told]
    assert scene.checkpoints(resumed)[: len(saved)] == saved
    assert scene.checkpoints(resumed)[len(saved) :] == [(30, 3)]


def test_a_job_that_waits_for_its_store_tells_so_less_and_less(scene: Scene) -> None:
    """Small: a store that is down wrote two events per 30 s for ever."""
    job_id = scene.add_job(recipe())
    host = replace(scene.host(scripted()), blobs=SickStore(scene.blobs, lambda _key: True))

    def tried_often() -> bool:
        supervise(host, job_id)
        return scene.job(job_id).fence >= 9

    wait_until(tried_often, seconds=90)
    job, told = scene.job(job_id), [m for m in scene.messages(job_id) if "store" in m or "started" in m]
    assert (job.state, job.losses, job.host_losses, job.rests) == (JobState.QUEUED, 0, 0, 9)
    assert len(told) == 5  # started; the 1st, 2nd, 4th, 8th return


def rot(scene: Scene, name: str) -> None:
    """Change a stored byte of every blob of this name."""
    found = [blob.key for blob in scene.blobs.list("jobs/") if blob.key.endswith(f"/{name}")]
    assert found
    for key in found:
        altered = read_bytes(scene.blobs, key) + b" "
        scene.blobs.delete(key)
        put_bytes(scene.blobs, key, altered)


def adapter(scene: Scene, job_id: str, folder: Path) -> bytes:
    return scene.unpacked(scene.artifacts(job_id)[Form.ADAPTER], folder)["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("rotten", "first_saved"),
    [
        (["checkpoints/20/loop.json"], [20, 30]),
        (["checkpoints/20/contents.json"], [20, 30]),
        (["checkpoints/20/loop.json", "checkpoints/10/adapter.safetensors"], [10, 20, 30]),
    ],
    ids=["newest", "its list of contents", "all"],
)
def test_a_rotten_checkpoint_costs_its_steps_and_nothing_else(
    scene: Scene, tmp_path: Path, rotten: list[str], first_saved: list[int]
) -> None:
    """S10: the next older one is taken, then none; no loss is counted, and the result has the same bytes."""
    whole, job_id = (scene.add_job(recipe(steps=40)) for _ in range(2))
    supervise(scene.host(scripted()), whole)
    supervise(scene.host(scripted(die_at=25)), job_id)
    assert scene.checkpoints(job_id) == [(10, 1), (20, 1)]
    for name in rotten:
        rot(scene, name)
    work_until_done(scene, scene.host(scripted()), [job_id])
    job = scene.job(job_id)
    assert (job.state, job.fence, job.losses) == (JobState.SUCCEEDED, 2, 0)
    assert scene.checkpoints(job_id)[2:] == [(step, 2) for step in first_saved]
    told = [message for message in scene.messages(job_id) if "cannot be used" in message]
    assert len(told) == len(rotten)
    assert adapter(scene, job_id, tmp_path) == adapter(scene, whole, tmp_path)


def test_a_checkpoint_that_a_new_release_refuses_is_passed_over(scene: Scene) -> None:
    """S10: the training process says so, and the same attempt goes on from the older one."""
    job_id = scene.add_job(recipe(steps=40))
    supervise(scene.host(scripted(die_at=25)), job_id)
    work_until_done(scene, scene.host(scripted(refuses_step=20)), [job_id])
    job = scene.job(job_id)
    assert (job.state, job.fence, job.losses) == (JobState.SUCCEEDED, 2, 0)
    assert scene.checkpoints(job_id)[2:] == [(20, 2), (30, 2)]
    assert job.error is None


def test_a_store_that_is_away_condemns_no_checkpoint(scene: Scene) -> None:
    """S10: an error of the connection says nothing about the bytes."""
    job_id = scene.add_job(recipe(steps=40))
    supervise(scene.host(scripted(die_at=25)), job_id)
    away = SickStore(scene.blobs, lambda key: "/checkpoints/" in key)
    supervise(replace(scene.host(scripted()), blobs=away), job_id)
    assert scene.job(job_id).state == JobState.QUEUED
    work_until_done(scene, scene.host(scripted()), [job_id])
    assert scene.checkpoints(job_id)[2:] == [(30, 3)]


def copy_of(url: str, folder: Path) -> str:
    """A backup of a database that nobody is connected to, ready to be used in its place."""
    if not BACKEND.is_production:
        shutil.copy(url.removeprefix("sqlite:///"), folder / "backup.db")
        return f"sqlite:///{folder / 'backup.db'}"
    here = make_url(url)
    run_sql(BACKEND.postgres(), f"CREATE DATABASE {here.database}_backup TEMPLATE {here.database}")
    return here.set(database=f"{here.database}_backup").render_as_string(hide_password=False)


def test_a_restored_database_meets_the_blobs_of_later_attempts(tmp_path: Path) -> None:
    """S29: an attempt that got an old number again died on the keys that the first one had written."""
    settings = settings_in(tmp_path / "data", lease=HASTY)
    scene = open_scene(settings)
    job_id = scene.add_job(recipe())
    scene.database.close()
    backup = settings.model_copy(update={"database_url": copy_of(settings.database_url, tmp_path)})
    scene = replace(scene, database=open_database(settings))
    supervise(scene.host(scripted(die_at=25)), job_id)
    assert scene.checkpoints(job_id)
    scene.database.close()
    scene = replace(scene, settings=backup, database=open_database(backup))
    assert scene.job(job_id).fence == 0
    supervise(scene.host(scripted()), job_id)
    job = scene.job(job_id)
    assert (job.state, job.fence, job.losses, job.host_losses) == (JobState.SUCCEEDED, 1, 0, 0)
    assert scene.checkpoints(job_id) == [(10, 1), (20, 1)]
    scene.database.close()


def test_a_disk_that_fills_up_under_a_training_process_is_not_its_fault(scene: Scene) -> None:
    """S1: whatever it died of, no room was left when it did. A part of the disk stands for all of it."""
    job_id = scene.add_job(recipe())
    gib = 2**30
    scene.settings.data.mkdir(parents=True, exist_ok=True)
    low_water = shutil.disk_usage(scene.settings.data).free - 3 * gib // 2
    if low_water < gib:
        pytest.skip("the disk has too little room to take some of it away")
    limits = scene.settings.limits.model_copy(update={"free_bytes": low_water})
    crowded = replace(scene, settings=scene.settings.model_copy(update={"limits": limits}))
    supervise(crowded.host(scripted(exit_at=5, fills=5 * gib // 2)), job_id)
    job = scene.job(job_id)
    assert (job.state, job.losses, job.host_losses, job.rests) == (JobState.QUEUED, 0, 0, 1)
    supervise(scene.host(scripted(exit_at=5)), job_id)
    assert scene.job(job_id).losses == 1


def test_a_job_that_must_be_left_to_others_is_passed_on(scene: Scene, tmp_path: Path) -> None:
    """S1: its message must not end with the worker that may not take it."""
    sick = tmp_path / "sick"
    sick.touch()
    host = sick_host(scene, "no program", sick)
    with scene.database.writing() as session:
        other = enrol_worker(session, host="other", devices="none", queues=["train.cpu"])
        session.commit()
    job_id = scene.add_job(recipe(steps=10))
    supervise(host, job_id)
    scene.wakes.clear()
    supervise(host, job_id)
    assert (scene.job(job_id).fence, scene.wakes) == (1, [Wake("immunotune.run_job", job_id, "train.cpu")])
    supervise(replace(scene.host(scripted()), worker_id=other), job_id)
    assert scene.job(job_id).state == JobState.SUCCEEDED


def test_a_waiting_worker_says_that_it_is_there(scene: Scene) -> None:
    """S1: whoever has no job to beat for would be nobody to leave one to."""

    def seen_ago() -> float:
        with scene.database.reading() as session:
            return read_clock(session) - session.scalars(select(Worker.seen_at)).one()

    with scene.database.writing() as session:
        session.execute(update(Worker).values(seen_at=0.0))
        session.commit()
    presence.say_present(scene.host(scripted()))
    wait_until(lambda: seen_ago() < 60, seconds=20)

import os
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import select, update

from app.core import files
from app.core.broker import CHECKS_QUEUE, CPU_QUEUE, Wake, queue_depth, wake
from app.core.jobs import ended, jobs, lease, reaper
from app.core.settings import Settings
from app.core.storage.blobs import BlobMissing, BlobStore, put_bytes
from app.core.storage.blobs.folder import FolderBlobs
from app.core.storage.database import Database
from app.core.storage.job_states import JobState
from app.core.storage.tables import BaseRow, File, Job, Project
from app.core.telemetry import CHECKS_OVERDUE
from tests.support.jobs import SUCCESS, add_file, add_job, patient, published
from tests.support.waiting import wait_until


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return patient(settings)


def age(database: Database, **columns: float) -> None:
    """Move stored times of all jobs into the past by so many seconds."""
    with database.writing() as session:
        values = {name: getattr(Job, name) - seconds for name, seconds in columns.items()}
        session.execute(update(Job).values(values))
        session.commit()


def claimed(database: Database, settings: Settings, job: Job) -> lease.Lease:
    with database.writing() as session:
        held = lease.claim(session, settings, job.id, "w")
        session.commit()
    assert held is not None
    return held


def expire(database: Database, settings: Settings) -> tuple[Wake, ...]:
    with database.writing() as session:
        wakes = reaper.expire(session, settings.lease)
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


def test_a_lost_worker_gives_its_job_back_until_the_third_loss(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings)
    for losses in (1, 2):
        claimed(database, settings, job)
        age(database, lease_until=600)
        assert expire(database, settings) == (Wake("immunotune.run_job", job.id, "train.cpu"),)
        assert expire(database, settings) == ()
        assert (now_of(database, job).state, now_of(database, job).losses) == ("queued", losses)
    claimed(database, settings, job)
    age(database, lease_until=600)
    assert expire(database, settings) == ()
    found = now_of(database, job)
    assert (found.state, (found.error or {})["code"]) == ("failed", "worker_crashed")


def test_a_job_that_saves_nothing_for_hours_is_ended_though_it_beats(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings)
    held = claimed(database, settings, job)
    age(database, saved_at=settings.lease.stall_seconds + 1)
    expire(database, settings)
    found = now_of(database, job)
    assert (found.state, (found.error or {})["code"], found.fence) == ("failed", "job_stalled", held.fence + 1)


def test_a_lost_wake_up_is_sent_again(
    database: Database, settings: Settings, project: Project, base: BaseRow, broker: Celery
) -> None:
    add_job(database, project, settings)
    add_job(database, project, settings, queued=False)
    reaper.rewake(database, broker, settings)
    assert (queue_depth(broker, CPU_QUEUE), queue_depth(broker, CHECKS_QUEUE)) == (0, 0)
    age(database, woken_at=600)
    reaper.rewake(database, broker, settings)
    assert (queue_depth(broker, CPU_QUEUE), queue_depth(broker, CHECKS_QUEUE)) == (1, 1)


def test_messages_never_outnumber_what_waits(
    database: Database, settings: Settings, project: Project, base: BaseRow, broker: Celery
) -> None:
    made = [add_job(database, project, settings) for _ in range(3)]
    wake(broker, *(jobs.wake_for(job) for job in made[:2]))
    for _ in range(4):
        age(database, woken_at=600)
        reaper.rewake(database, broker, settings)
    assert queue_depth(broker, CPU_QUEUE) == 3


def test_resting_jobs_and_jobs_without_their_base_are_not_woken(
    database: Database, settings: Settings, project: Project, base: BaseRow, broker: Celery
) -> None:
    resting, waiting = add_job(database, project, settings), add_job(database, project, settings)
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == resting.id).values(run_after=Job.run_after + 600))
        session.execute(update(BaseRow).values(status="aligning"))
        session.commit()
    age(database, woken_at=600)
    reaper.rewake(database, broker, settings)
    assert queue_depth(broker, CPU_QUEUE) == 0
    assert now_of(database, waiting).state == "queued"


def test_a_job_that_no_worker_checks_waits_and_is_an_alarm(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S21: a quarter of an hour without a checks worker failed every accepted job."""
    job = add_job(database, project, settings, queued=False)
    age(database, created_at=901)
    with database.writing() as session:
        reaper.note_overdue_checks(session, settings.limits.check_seconds)
        session.commit()
    assert now_of(database, job).state == "validating_files"
    assert CHECKS_OVERDUE._value.get() == 1
    age(database, created_at=-901)
    with database.writing() as session:
        reaper.note_overdue_checks(session, settings.limits.check_seconds)
    assert CHECKS_OVERDUE._value.get() == 0


def test_a_job_whose_check_is_under_way_wakes_nobody_else(
    database: Database, settings: Settings, project: Project, base: BaseRow, broker: Celery
) -> None:
    """S20: a check that says it works is left alone, however long ago its message was sent."""
    job = add_job(database, project, settings, queued=False)
    age(database, woken_at=600)
    with database.writing() as session:
        assert jobs.keep_unchecked(session, job.id)
        session.commit()
    reaper.rewake(database, broker, settings)
    assert queue_depth(broker, CHECKS_QUEUE) == 0


def test_a_deleted_file_loses_its_bytes_and_keeps_its_row(
    database: Database, settings: Settings, project: Project, blobs: BlobStore
) -> None:
    file = add_file(database, project, settings)
    put_bytes(blobs, file.blob_key, b"rows")
    reaper.erase_deleted(database, blobs)
    assert b"".join(blobs.read(file.blob_key)) == b"rows"
    with database.writing() as session:
        files.delete_file(session, project.id, file.id)
        session.commit()
    reaper.erase_deleted(database, blobs)
    with pytest.raises(BlobMissing):
        blobs.read(file.blob_key)
    with database.reading() as session:
        assert session.scalars(select(File.erased_at).where(File.id == file.id)).one() is not None


def test_only_blobs_that_no_row_needs_are_swept(
    database: Database, settings: Settings, project: Project, base: BaseRow, blobs: BlobStore
) -> None:
    running, done = add_job(database, project, settings), add_job(database, project, settings)
    held = claimed(database, settings, done)
    saved = lease.SavedCheckpoint(20, f"{held.prefix}/checkpoints/20", "print", {})
    result = published(held, *SUCCESS, blobs=blobs)
    with database.writing() as session:
        lease.beat(session, settings.lease, held, lease.Beat(checkpoints=(saved,)), worker_id="w")
        ended.finish(session, held, result)
        session.commit()
    file = add_file(database, project, settings)
    needed = {
        file.blob_key,
        f"jobs/{running.id}/1/checkpoints/20/loop.json",
        f"{result.prefix}/reports/safety.json",
    }
    orphans = {
        f"{saved.prefix}/adapter.safetensors",  # nobody resumes from the checkpoint of an ended job
        "files/proj_x/file-absent",
        "jobs/ftjob-absent/1/result/adapter.zip",
        f"jobs/{done.id}/0/result/adapter.zip",
        f"{held.prefix}/checkpoints/2/loop.json",
    }
    for key in needed | orphans:
        put_bytes(blobs, key, b"x")
    assert reaper.sweep(database, blobs, older_than_seconds=3600) == 0
    assert reaper.sweep(database, blobs, older_than_seconds=-60) == len(orphans)
    left = {blob.key for blob in blobs.list("")}
    assert needed <= left
    assert not orphans & left
    assert {one.blob.key for one in result.files} <= left


def test_what_a_cancelled_job_stored_goes_soon(
    database: Database, settings: Settings, project: Project, base: BaseRow, blobs: BlobStore
) -> None:
    job = add_job(database, project, settings)
    held = claimed(database, settings, job)
    put_bytes(blobs, f"{held.prefix}/checkpoints/20/adapter.safetensors", b"x")
    assert reaper.sweep(database, blobs, older_than_seconds=3600) == 0
    with database.writing() as session:
        jobs.cancel(session, project.id, job.id)
        session.commit()
    assert reaper.sweep(database, blobs, older_than_seconds=3600) == 1
    assert list(blobs.list("jobs/")) == []


def test_cut_off_uploads_are_removed_when_old(database: Database, tmp_path: Path) -> None:
    store = FolderBlobs(tmp_path / "blobs")
    put_bytes(store, "files/kept", b"x")
    left = tmp_path / "blobs" / ".incoming" / "0123"
    left.write_bytes(b"half")
    assert store.discard_unfinished(3600) == 0
    assert reaper.sweep(database, store, older_than_seconds=3600) == 0
    os.utime(left, (0, 0))
    assert reaper.sweep(database, store, older_than_seconds=3600) == 1
    assert not left.exists()


def test_the_thread_takes_a_job_back_and_wakes_it(
    database: Database, settings: Settings, project: Project, base: BaseRow, broker: Celery
) -> None:
    job = add_job(database, project, settings)
    claimed(database, settings, job)
    age(database, lease_until=600)
    ticking = reaper.Reaper(database, broker, FolderBlobs(settings.data / "blobs"), settings)
    ticking.start()
    try:
        wait_until(lambda: now_of(database, job).state == JobState.QUEUED, seconds=10)
        wait_until(lambda: queue_depth(broker, CPU_QUEUE) == 1, seconds=10)
    finally:
        ticking.stop()


def test_the_thread_outlives_a_bad_tick(
    database: Database, settings: Settings, project: Project, base: BaseRow, broker: Celery
) -> None:
    with database.writing() as session:
        file = add_file(database, project, settings)
        session.execute(update(File).where(File.id == file.id).values(blob_key="../not a key", deleted_at=1.0))
        session.commit()
    job = add_job(database, project, settings)
    ticking = reaper.Reaper(database, broker, FolderBlobs(settings.data / "blobs"), settings)
    ticking.start()
    try:
        claimed(database, settings, job)
        age(database, lease_until=600)
        wait_until(lambda: now_of(database, job).state == JobState.QUEUED, seconds=10)
    finally:
        ticking.stop()

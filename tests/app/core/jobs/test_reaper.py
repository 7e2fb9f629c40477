import time
from functools import partial

import pytest
from celery import Celery
from prometheus_client import REGISTRY
from sqlalchemy import select, text, update

from app.core import deployment, files
from app.core.broker import CHECKS_QUEUE, CPU_QUEUE, queue_depth, wake
from app.core.jobs import ended, jobs, lease, reaper, sweep, workers
from app.core.settings import Settings
from app.core.storage.blobs import BlobMissing, BlobStore, put_bytes
from app.core.storage.blobs.folder import FolderBlobs
from app.core.storage.database import Database
from app.core.storage.job_states import JobState
from app.core.storage.tables import BaseRow, File, Job, Project, Worker
from app.core.telemetry import CHECKS_OVERDUE
from tests.support.jobs import SUCCESS, add_file, add_job, bind_as_it_is, patient, published
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


def now_of(database: Database, job: Job) -> Job:
    with database.reading() as session:
        return session.scalars(select(Job).where(Job.id == job.id)).one()


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
    bind_as_it_is(database, blobs)
    for key in needed | orphans:
        put_bytes(blobs, key, b"x")
    assert sweep.sweep(database, blobs, older_than_seconds=3600) == 0
    assert sweep.sweep(database, blobs, older_than_seconds=-60) == 0  # it marks
    assert sweep.sweep(database, blobs, older_than_seconds=-60) == len(orphans)
    left = {blob.key for blob in blobs.list("")}
    assert needed <= left
    assert not orphans & left
    assert {one.blob.key for one in result.files} <= left


def test_what_a_cancelled_job_stored_goes_soon(
    database: Database, settings: Settings, project: Project, base: BaseRow, blobs: BlobStore
) -> None:
    bind_as_it_is(database, blobs)
    job = add_job(database, project, settings)
    held = claimed(database, settings, job)
    put_bytes(blobs, f"{held.prefix}/checkpoints/20/adapter.safetensors", b"x")
    assert sweep.sweep(database, blobs, older_than_seconds=3600) == 0
    with database.writing() as session:
        jobs.cancel(session, project.id, job.id)
        session.commit()
    assert sweep.sweep(database, blobs, older_than_seconds=3600) == 0
    assert sweep.sweep(database, blobs, older_than_seconds=3600) == 1
    assert list(blobs.list("jobs/")) == []


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


def test_one_undeletable_blob_holds_up_nothing(
    database: Database, settings: Settings, project: Project, base: BaseRow, broker: Celery
) -> None:
    """S13: other files are erased, blobs are swept and leases taken back beside a blob that cannot be deleted."""
    blobs = FolderBlobs(settings.data / "blobs")
    bind_as_it_is(database, blobs)
    bad, good = (add_file(database, project, settings, blobs=blobs) for _ in range(2))
    with database.writing() as session:
        session.execute(update(File).values(deleted_at=1.0))
        session.execute(update(File).where(File.id == bad.id).values(blob_key="../not a key"))
        session.commit()
    put_bytes(blobs, "files/proj_x/file-orphan", b"x")
    job = add_job(database, project, settings)
    at_once = settings.limits.model_copy(update={"sweep_seconds": 0.1, "orphan_blob_seconds": 0.0})
    ticking = reaper.Reaper(database, broker, blobs, settings.model_copy(update={"limits": at_once}))
    ticking.start()
    try:
        claimed(database, settings, job)
        age(database, lease_until=600)
        wait_until(lambda: now_of(database, job).state == JobState.QUEUED, seconds=10)
        wait_until(lambda: list(blobs.list("files/")) == [], seconds=10)
        wait_until(lambda: failures_of(database, bad) == 1, seconds=10)
    finally:
        ticking.stop()
    with database.reading() as session:
        assert session.scalars(select(File.erased_at).where(File.id == good.id)).one() is not None
    reaper.erase_deleted(database, blobs)
    assert failures_of(database, bad) == 1  # it rests


def failures_of(database: Database, file: File) -> int | None:
    with database.reading() as session:
        return session.scalars(select(File.erase_failures).where(File.id == file.id)).one()


def test_a_duty_that_fails_holds_up_no_other(
    database: Database, settings: Settings, project: Project, base: BaseRow, broker: Celery
) -> None:
    """S13: with one table gone leases are still taken back, and the metrics say which duty is not done."""
    job = add_job(database, project, settings)
    claimed(database, settings, job)
    age(database, lease_until=600)
    ok = partial(REGISTRY.get_sample_value, "immunotune_duty_last_ok_seconds")
    failed = partial(REGISTRY.get_sample_value, "immunotune_duties_failed_total")
    before, began = failed({"duty": "forget_replies"}) or 0.0, time.time()
    rename(database, "replies", "replies_away")
    ticking = reaper.Reaper(database, broker, FolderBlobs(settings.data / "blobs"), settings)
    ticking.start()
    try:
        wait_until(lambda: now_of(database, job).state == JobState.QUEUED, seconds=10)
        wait_until(lambda: (failed({"duty": "forget_replies"}) or 0.0) > before, seconds=10)
        wait_until(lambda: (ok({"duty": "expire"}) or 0.0) > began, seconds=10)
        wait_until(lambda: (ok({"duty": "rewake"}) or 0.0) > began, seconds=10)
    finally:
        ticking.stop()
        rename(database, "replies_away", "replies")


def rename(database: Database, name: str, other: str) -> None:
    with database.writing() as session:
        session.execute(text(f"ALTER TABLE {name} RENAME TO {other}"))
        session.commit()


@pytest.mark.parametrize(
    ("statement", "table"),
    [
        ("SELECT id FROM files WHERE deleted_at IS NULL AND expires_at <= 1", "files"),
        ("SELECT id FROM files WHERE deleted_at IS NOT NULL AND erased_at IS NULL", "files"),
        ("SELECT id FROM files WHERE blob_key IN ('a', 'b')", "files"),
        ("DELETE FROM replies WHERE created_at < 1", "replies"),
        ("SELECT id FROM jobs WHERE state IN ('queued', 'running') AND training_file = 'f'", "jobs"),
        ("SELECT id FROM jobs WHERE state IN ('queued', 'running') AND validation_file = 'f'", "jobs"),
        ("SELECT id FROM jobs WHERE state = 'running' AND saved_at < 1", "jobs"),
        ("SELECT id FROM jobs WHERE state = 'validating_files' AND created_at < 1", "jobs"),
    ],
)
def test_what_is_due_is_found_by_an_index(database: Database, statement: str, table: str) -> None:
    """S13: no look for what is due reads a whole table."""
    with database.reading() as session:
        if database.engine.dialect.name == "sqlite":
            plan = session.execute(text(f"EXPLAIN QUERY PLAN {statement}")).all()
        else:
            session.execute(text("SET LOCAL enable_seqscan = off"))  # these tables are too small for an index to pay
            plan = session.execute(text(f"EXPLAIN {statement}")).all()
    lines = [str(row[-1]) for row in plan]
    assert any(line.startswith(f"SEARCH {table} USING") or "Index Scan" in line for line in lines), lines


def test_a_renamed_queue_orphans_no_job(
    database: Database, settings: Settings, project: Project, base: BaseRow, broker: Celery
) -> None:
    """S22: after a start with another queue the waiting job is woken there, also one that an old replica adds later."""
    blobs = FolderBlobs(settings.data / "blobs")
    bind_as_it_is(database, blobs)
    renamed = settings.model_copy(update={"train_queue": "train.gpu24"})
    before = add_job(database, project, settings)
    with database.writing() as session:
        deployment.serve_queue(session, renamed)
        session.commit()
    assert now_of(database, before).queue == "train.gpu24"
    late = add_job(database, project, settings)
    ticking = reaper.Reaper(database, broker, blobs, settings)
    ticking.start()
    try:
        wait_until(lambda: queue_depth(broker, "train.gpu24") == 2, seconds=10)
    finally:
        ticking.stop()
    assert now_of(database, late).queue == "train.gpu24"


def test_a_resting_worker_shows_in_metrics(
    database: Database, settings: Settings, project: Project, broker: Celery
) -> None:
    """S1: the circuit breaker is visible where operators look."""

    def shows(count: int) -> None:
        wait_until(lambda: REGISTRY.get_sample_value("immunotune_workers_resting") == count, seconds=10)

    with database.writing() as session:
        worker_id = lease.enrol_worker(session, host="a", devices="cpu")
        lease.enrol_worker(session, host="b", devices="cpu")
        session.commit()
    ticking = reaper.Reaper(database, broker, FolderBlobs(settings.data / "blobs"), settings)
    ticking.start()
    try:
        shows(0)
        with database.writing() as session:
            workers.note_faults(session, worker_id, faults=3, rest_seconds=60.0)
            session.commit()
        shows(1)
        with database.writing() as session:
            session.execute(update(Worker).values(resting_until=Worker.resting_until + 7200))  # the clock went back
            session.commit()
        shows(0)
    finally:
        ticking.stop()

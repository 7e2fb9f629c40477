"""What is kept for a while only: after it, it is gone, and what is needed stays."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import select, update

from app.core import files, models
from app.core.jobs import ended, jobs, lease, retention, sweep
from app.core.jobs.jobs import JobError
from app.core.settings import RetentionSettings, Settings
from app.core.storage.blobs import BlobStore, put_bytes
from app.core.storage.blobs.folder import FolderBlobs
from app.core.storage.database import Database, db_now
from app.core.storage.tables import Artifact, BaseRow, Event, File, Form, Job, Project, Worker
from tests.support.jobs import SUCCESS, add_job, bind_as_it_is, patient, published
from tests.support.waiting import wait_until

KEPT = RetentionSettings()
ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return patient(settings)


def end(database: Database, settings: Settings, job: Job, blobs: BlobStore, *, passed: bool = True) -> ended.Published:
    """The job with all its results and two reports beside them, released or held back."""
    with database.writing() as session:
        held = lease.claim(session, settings, job.id, "w")
        assert held is not None
        result = published(held, *SUCCESS, blobs=blobs)
        for name in ("safety", "rows"):
            put_bytes(blobs, f"{result.prefix}/reports/{name}.json", b"{}")
        put_bytes(blobs, f"{result.prefix}/ledger/line.jsonl", b"{}\n")
        if passed:
            ended.finish(session, held, result)
        else:
            ended.fail(session, held, JobError("safety_gate_failed", "..."), published=result, quarantine=True)
        session.commit()
    return result


def age(database: Database, days: float) -> None:
    """Move the end of every job so far into the past."""
    with database.writing() as session:
        session.execute(update(Job).values(finished_at=Job.finished_at - days * retention.DAY))
        session.commit()


def test_quarantined_weights_go_after_thirty_days_and_reports_stay(
    database: Database, settings: Settings, project: Project, base: BaseRow, blobs: BlobStore
) -> None:
    """S28: weights that the gate held back are erased, and only they; those of a released job stay."""
    bad, good = add_job(database, project, settings), add_job(database, project, settings)
    end(database, settings, bad, blobs, passed=False)
    end(database, settings, good, blobs)
    for days, hidden in ((29, 0), (2, 2), (0, 0)):
        age(database, days)
        with database.writing() as session:
            assert retention.hide_quarantined(session, KEPT) == hidden
            session.commit()
    with database.reading() as session:
        left = {result.artifact.form for result in jobs.list_artifacts(session, project.id, bad.id)}
        assert left == {Form.METRICS, Form.REPORTS}
        assert len(jobs.list_artifacts(session, project.id, good.id)) == len(SUCCESS)


@pytest.mark.parametrize("way", ["deleted", "old"])
def test_loose_reports_go_with_the_last_file_or_in_time(
    database: Database, settings: Settings, project: Project, base: BaseRow, blobs: BlobStore, way: str
) -> None:
    """S28: single reports and the ledger do not outlive a job's files, nor their time."""
    bind_as_it_is(database, blobs)
    job, other = add_job(database, project, settings), add_job(database, project, settings)
    result, kept = end(database, settings, job, blobs), end(database, settings, other, blobs)

    def swept() -> int:
        return sum(sweep.sweep(database, blobs, older_than_seconds=-60) for _ in range(2))

    assert swept() == 0
    if way == "deleted":
        with database.writing() as session:
            name = jobs.get_job(session, project.id, job.id).fine_tuned_model
            assert name is not None
            models.delete_model(session, project.id, name)
            for found in jobs.list_artifacts(session, project.id, job.id):
                files.delete_file(session, project.id, found.file.id)
            session.commit()
        swept()
        assert [*blobs.list(f"{result.prefix}/reports/"), *blobs.list(f"{result.prefix}/ledger/")] == []
        assert len(list(blobs.list(f"{kept.prefix}/reports/"))) == 2
    else:
        age(database, 401)
        assert swept() == 6
        assert {blob.key for blob in blobs.list(f"{kept.prefix}/")} == {one.blob.key for one in kept.files}


def test_events_of_old_jobs_go_and_the_jobs_stay(
    database: Database, settings: Settings, project: Project, base: BaseRow, blobs: BlobStore
) -> None:
    """S28: the story of a job is kept for a while after its end; a job that runs keeps all of it."""
    old, live = add_job(database, project, settings), add_job(database, project, settings)
    end(database, settings, old, blobs)
    for days, gone in ((399, False), (2, True)):
        age(database, days)
        with database.writing() as session:
            assert (retention.forget_events(session, KEPT) > 0) is gone
            session.commit()
    with database.reading() as session:
        assert set(session.scalars(select(Event.job_id))) == {live.id}
        assert jobs.get_job(session, project.id, old.id).result is not None


def test_rows_of_workers_that_ended_go(database: Database, settings: Settings, project: Project, base: BaseRow) -> None:
    """S28: drained workers after a month, silent ones after a year, never one that holds a job."""
    job = add_job(database, project, settings)
    with database.writing() as session:
        made = {
            name: lease.enrol_worker(session, host=name, devices="") for name in ("new", "drained", "silent", "busy")
        }
        lease.drain_worker(session, made["drained"])
        lease.drain_worker(session, made["busy"])
        assert lease.claim(session, settings, job.id, made["busy"]) is not None
        for name, days in (("drained", 31), ("busy", 31), ("silent", 300)):
            seen_at = db_now() - days * retention.DAY
            session.execute(update(Worker).where(Worker.id == made[name]).values(seen_at=seen_at))
        assert retention.forget_workers(session, KEPT) == 1
        session.execute(update(Worker).values(seen_at=Worker.seen_at - 100 * retention.DAY))
        assert retention.forget_workers(session, KEPT) == 1
        assert set(session.scalars(select(Worker.host))) == {"new", "busy"}


_WRITER = """
import sys, time
from pathlib import Path
from app.core.storage.blobs.folder import FolderBlobs

def endless():
    yield b"half"
    print("begun", flush=True)
    time.sleep(600)

FolderBlobs(Path(sys.argv[1])).put("a/b", endless())
"""


def test_what_a_killed_upload_left_goes_in_a_minute_and_a_slow_one_goes_on(tmp_path: Path) -> None:
    """S28: kill -9 lets the bytes go after 60 s; an upload that only takes long is left alone, whatever its age."""
    store = FolderBlobs(tmp_path / "blobs")
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(store.root)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "begun\n"
    (left,) = (store.root / ".incoming").iterdir()
    os.utime(left, (0, 0))
    assert store.discard_unfinished(KEPT.unfinished_seconds) == 0
    writer.send_signal(signal.SIGKILL)
    writer.wait(20)
    wait_until(lambda: store.discard_unfinished(KEPT.unfinished_seconds) == 1, seconds=10)
    assert not left.exists()


def test_an_alignment_in_use_is_never_hidden(database: Database, settings: Settings, base: BaseRow) -> None:
    """S28: the base's alignment stays, whatever its artifact says."""
    with database.writing() as session:
        session.execute(update(Artifact).values(quarantined=True))
        session.execute(update(Job).values(finished_at=1.0))
        assert retention.hide_quarantined(session, KEPT) == 0
        assert session.scalars(select(File.deleted_at).where(File.id == base.alignment_file)).one() is None

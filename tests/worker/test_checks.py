"""Facts about the checks of jobs, on a real database, a real blob folder and a real small tokenizer."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest
from sqlalchemy import update

from app.core import files
from app.core.broker import CHECK_JOB, RUN_JOB, Wake
from app.core.ids import Prefix, new_id
from app.core.jobs import jobs
from app.core.jobs.policy import CreateJob
from app.core.settings import LimitSettings, Settings
from app.core.storage.blobs import BlobStore, open_blobs, put_bytes
from app.core.storage.database import Database, Page
from app.core.storage.tables import BaseRow, Event, FileStatus, Job, Project
from finetuning.rows.report import SHOWN_ERRORS
from finetuning.rows.scanner import RowScanner
from tests.support.base_folder import make_base
from worker.attempt.supervisor import Host
from worker.checks import check_job
from worker.tasks import build_worker

USER, ANSWER = {"role": "user", "content": "Where is my parcel?"}, {"role": "assistant", "content": "It is on its way."}


def row(*messages: object) -> bytes:
    return json.dumps({"messages": messages or (USER, ANSWER)}).encode()


def rows(count: int) -> bytes:
    return b"".join(row({**USER, "content": f"Where is parcel {n}?"}, ANSWER) + b"\n" for n in range(count))


@dataclass
class Shop:
    """A service without its processes: what a checks worker works on."""

    host: Host
    project: Project
    woken: list[Wake] = field(default_factory=list[Wake])

    def upload(self, data: bytes) -> str:
        file_id = new_id(Prefix.FILE)
        blob = put_bytes(self.host.blobs, files.blob_key(self.project.id, file_id), data)
        scanner = RowScanner()
        scanner.feed(data)
        found = scanner.close().to_json(SHOWN_ERRORS)
        new = files.NewFile(file_id, blob, "a.jsonl", FileStatus.PROCESSED, found)
        with self.host.database.writing() as session:
            files.add_file(session, self.project.id, new, limits=self.host.settings.limits)
            session.commit()
        return file_id

    def create(self, training: str, validation: str | None = None) -> str:
        request = CreateJob(model="tiny", training_file=training, validation_file=validation)
        with self.host.database.writing() as session:
            job = jobs.add_job(session, self.host.settings, self.project, request)
            session.commit()
            return job.id

    def job(self, job_id: str) -> Job:
        with self.host.database.reading() as session:
            return jobs.get_job(session, self.project.id, job_id)

    def events(self, job_id: str) -> list[Event]:
        with self.host.database.reading() as session:
            return list(jobs.list_events(session, self.project.id, job_id, Page(descending=False)).rows)


@pytest.fixture
def shop(settings: Settings, database: Database, project: Project, base: BaseRow, tmp_path: Path) -> Shop:
    make_base(settings.data / "bases" / base.id)
    woken: list[Wake] = []
    return Shop(Host(settings, database, open_blobs(settings), "worker_1", wake=woken.extend), project, woken)


def test_a_good_job_is_queued_for_whole_epochs(shop: Shop) -> None:
    job_id = shop.create(shop.upload(rows(40)))
    check_job(shop.host, job_id)
    job = shop.job(job_id)
    assert (job.state, job.error) == ("queued", None)
    assert (job.recipe["steps"], job.recipe["epochs"]) == (0, 5)
    assert [(wake.task, wake.id) for wake in shop.woken] == [("immunotune.run_job", job_id)]
    counted = next(event for event in shop.events(job_id) if event.data)
    assert counted.data is not None
    assert counted.data["rows"] == 40
    assert counted.message.startswith("Training file: 40 rows, ")


def test_a_row_without_a_trained_token_left_fails_the_job(shop: Shop) -> None:
    long = row({"role": "user", "content": "parcel? " * 2000}, ANSWER)
    job_id = shop.create(shop.upload(rows(12) + long))
    check_job(shop.host, job_id)
    error = shop.job(job_id).error
    assert error is not None
    (found,) = error["details"]["errors"]  # type: ignore[index,call-overload]
    assert (found["line"], found["code"]) == (13, "no_trainable_tokens")


def test_a_cut_row_is_reported_and_does_not_fail_the_job(shop: Shop) -> None:
    long = row(USER, {"role": "assistant", "content": "parcel? " * 2000})
    job_id = shop.create(shop.upload(rows(12) + long))
    check_job(shop.host, job_id)
    assert shop.job(job_id).state == "queued"
    (warned,) = [event for event in shop.events(job_id) if event.level == "warn"]
    assert warned.data == {"code": "example_too_long", "rows": 1, "line": 13}


def test_a_long_row_gets_the_room_that_the_base_has(shop: Shop) -> None:
    (shop.host.settings.data / "bases" / "tiny" / "config.json").write_text('{"max_position_embeddings": 1024}')
    long = row({"role": "user", "content": "parcel? " * 60}, ANSWER) + b"\n"
    too_long = row(USER, {"role": "assistant", "content": "parcel? " * 2000})
    job_id = shop.create(shop.upload(rows(12) + long))
    check_job(shop.host, job_id)
    job = shop.job(job_id)
    assert job.state == "queued"
    assert 128 < int(str(job.recipe["max_tokens"])) < 1024
    assert 1 <= int(str(job.recipe["micro_batch_size"])) < 8
    assert not [event for event in shop.events(job_id) if event.level == "warn"]
    cut_id = shop.create(shop.upload(rows(12) + long + too_long))
    check_job(shop.host, cut_id)
    assert (shop.job(cut_id).state, shop.job(cut_id).recipe["max_tokens"]) == ("queued", 1024)
    (warned,) = [event for event in shop.events(cut_id) if event.level == "warn"]
    assert warned.data == {"code": "example_too_long", "rows": 1, "line": 14}


def test_tools_fail_on_a_base_without_them(shop: Shop) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    with_tools = row(USER, {"role": "assistant", "content": None, "tool_calls": [call]})
    job_id = shop.create(shop.upload(rows(12) + with_tools))
    check_job(shop.host, job_id)
    error = shop.job(job_id).error
    assert error is not None
    (found,) = error["details"]["errors"]  # type: ignore[index,call-overload]
    assert (found["line"], found["code"]) == (13, "tools_not_supported")


def test_the_same_file_twice_is_a_warning(shop: Shop) -> None:
    file_id = shop.upload(rows(12))
    job_id = shop.create(file_id, file_id)
    check_job(shop.host, job_id)
    assert shop.job(job_id).state == "queued"
    codes = [(event.data or {}).get("code") for event in shop.events(job_id) if event.level == "warn"]
    assert codes == ["train_validation_overlap"]


def test_a_base_that_is_not_here_yet_leaves_the_job_waiting(shop: Shop) -> None:
    job_id = shop.create(shop.upload(rows(12)))
    folder = shop.host.settings.data / "bases" / "tiny"
    (folder / "tokenizer.json").rename(folder / "away.json")
    check_job(shop.host, job_id)
    assert shop.job(job_id).state == "validating_files"
    (folder / "away.json").rename(folder / "tokenizer.json")
    check_job(shop.host, job_id)
    assert shop.job(job_id).state == "queued"


def test_checking_a_job_twice_changes_nothing(shop: Shop) -> None:
    job_id = shop.create(shop.upload(rows(12)))
    check_job(shop.host, job_id)
    before = len(shop.events(job_id))
    check_job(shop.host, job_id)
    assert len(shop.events(job_id)) == before
    assert len(shop.woken) == 1


def test_a_cancelled_job_stays_cancelled(shop: Shop) -> None:
    job_id = shop.create(shop.upload(rows(12)))
    with shop.host.database.writing() as session:
        jobs.cancel(session, shop.project.id, job_id)
        session.commit()
    check_job(shop.host, job_id)
    assert shop.job(job_id).state == "cancelled"


def test_unknown_ids_are_no_error(shop: Shop) -> None:
    check_job(shop.host, "ftjob-absent")
    assert shop.woken == []


def test_the_checks_load_no_torch() -> None:
    code = "import sys, worker.checks; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_a_check_that_works_says_so_and_ends_with_its_job(shop: Shop) -> None:
    """S20: every checks worker was woken for the same job, each half minute that its check took."""
    job_id = shop.create(shop.upload(rows(40)))
    with shop.host.database.writing() as session:
        session.execute(update(Job).values(woken_at=1.0))
        session.commit()
    check_job(shop.host, job_id)
    assert (shop.job(job_id).woken_at or 0) > 1e9
    other = shop.create(shop.upload(rows(40)))
    with shop.host.database.writing() as session:
        assert jobs.keep_unchecked(session, other)
        jobs.cancel(session, shop.project.id, other)
        assert not jobs.keep_unchecked(session, other)


def test_a_check_that_takes_too_long_fails_its_job(shop: Shop) -> None:
    """S20: counting had no limit of time, so one file could keep a checks worker for as long as it liked."""
    hurried = shop.host.settings.model_copy(update={"limits": LimitSettings(check_seconds=1e-9)})
    job_id = shop.create(shop.upload(rows(40)))
    check_job(replace(shop.host, settings=hurried), job_id)
    job = shop.job(job_id)
    assert job.error is not None
    assert (job.state, job.error["code"], job.error["param"]) == ("failed", "invalid_training_file", "training_file")


@dataclass
class SlowStore:
    """A real blob store that takes its time before each answer."""

    store: BlobStore
    seconds: float

    def read(self, key: str, *, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        threading.Event().wait(self.seconds)
        return self.store.read(key, start=start, end=end)


def test_a_store_that_takes_its_time_fails_no_job(shop: Shop) -> None:
    """Review, S20: the limit counted what the check waited for, so that a slow store failed every job."""
    hurried = shop.host.settings.model_copy(update={"limits": LimitSettings(check_seconds=1.5)})
    job_id = shop.create(shop.upload(rows(40)))
    slow = cast(BlobStore, SlowStore(shop.host.blobs, 2.0))
    check_job(replace(shop.host, settings=hurried, blobs=slow), job_id)
    assert shop.job(job_id).state == "validating_files"
    check_job(shop.host, job_id)
    assert shop.job(job_id).state == "queued"


def test_the_hard_limits_stand_above_the_limits_of_job_and_check(settings: Settings) -> None:
    """S23: a task that ignores its own limit is ended by Celery; nothing else would ever end it."""
    celery = build_worker(settings)
    assert celery.tasks[CHECK_JOB].time_limit == settings.limits.check_seconds + 600
    assert celery.tasks[RUN_JOB].time_limit == 86_400 + 600

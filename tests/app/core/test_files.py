import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import update

from app.core import files
from app.core.errors import InvalidRequest, NotFound, QuotaExceeded
from app.core.ids import Prefix, new_id
from app.core.jobs import ended, jobs, lease
from app.core.jobs.policy import CreateJob
from app.core.settings import Settings
from app.core.storage.blobs import Blob
from app.core.storage.database import Database, Page
from app.core.storage.tables import BaseRow, File, FilePurpose, FileStatus, Form, Project
from tests.support.jobs import SUCCESS, add_file, add_job, published


def test_a_file_is_seen_by_its_project_alone(
    database: Database, settings: Settings, project: Project, baseline: Project
) -> None:
    file = add_file(database, project, settings)
    with database.reading() as session:
        assert files.get_file(session, project.id, file.id).filename == "train.jsonl"
        with pytest.raises(NotFound) as foreign:
            files.get_file(session, baseline.id, file.id)
        with pytest.raises(NotFound) as absent:
            files.get_file(session, project.id, file.id[:-1] + "-")
        assert files.list_files(session, baseline.id, Page()).rows == []
    assert foreign.value.message.replace(file.id, "") == absent.value.message.replace(file.id[:-1] + "-", "")


def test_an_added_file_holds_what_its_scan_found(database: Database, settings: Settings, project: Project) -> None:
    new = files.NewFile("file-x", Blob("files/x", 1, "0"), "a/b", FileStatus.ERROR, {"rows": 3}, "x" * 600)
    with database.writing() as session:
        files.add_file(session, project.id, new, limits=settings.limits)
        session.commit()
    with database.reading() as session:
        file = files.get_file(session, project.id, new.id)
    assert (file.filename, file.status, file.validation, file.status_details) == ("b", "error", {"rows": 3}, "x" * 512)


def test_expiry_counts_from_the_database_clock(database: Database, settings: Settings, project: Project) -> None:
    file_id = new_id(Prefix.FILE)
    blob = Blob(files.blob_key(project.id, file_id), 1, "0" * 64)
    new = files.NewFile(file_id, blob, "a", FileStatus.PROCESSED, {}, expires_after_seconds=3600)
    with database.writing() as session:
        file = files.add_file(session, project.id, new, limits=settings.limits)
        assert file.expires_at == pytest.approx(file.created_at + 3600, abs=60)
        assert files.hide_expired(session) == 0
        session.execute(update(File).values(expires_at=File.expires_at - 7200))
        assert files.hide_expired(session) == 1


def test_a_file_that_a_job_is_being_created_on_does_not_expire(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S18: on Postgres expiry waited for the create's lock, and then hid the file by what it had seen before."""
    file = add_file(database, project, settings)
    with database.writing() as session:
        session.execute(update(File).values(expires_at=File.created_at - 1))
        session.commit()
    ended = threading.Event()

    def hide() -> int:
        try:
            with database.writing() as session:
                hidden = files.hide_expired(session)
                session.commit()
                return hidden
        finally:
            ended.set()

    with ThreadPoolExecutor(1) as pool, database.writing() as session:
        jobs.add_job(session, settings, project, CreateJob(model="tiny", training_file=file.id))
        hiding = pool.submit(hide)
        ended.wait(0.5)  # SQLite lets nobody else write meanwhile, so there it cannot end before the commit
        session.commit()
        assert hiding.result(10) == 0
    with database.reading() as session:
        assert files.get_file(session, project.id, file.id).deleted_at is None


def test_a_project_cannot_store_more_than_it_may(database: Database, settings: Settings, project: Project) -> None:
    limits = settings.limits.model_copy(update={"project_bytes": 10})
    with database.writing() as session, pytest.raises(QuotaExceeded) as caught:
        for _ in range(2):
            file_id = new_id(Prefix.FILE)
            new = files.NewFile(file_id, Blob(f"files/{file_id}", 6, "0"), "a", FileStatus.PROCESSED, {})
            files.add_file(session, project.id, new, limits=limits)
    assert caught.value.code == "storage_quota_exceeded"


def test_uploads_that_end_together_share_one_quota(database: Database, settings: Settings, project: Project) -> None:
    """Review: each of them counted without the others, and a project stored more than it may."""
    limits = settings.limits.model_copy(update={"project_bytes": 10})

    def upload(ends: threading.Event | None = None) -> None:
        with database.writing() as session:
            file_id = new_id(Prefix.FILE)
            new = files.NewFile(file_id, Blob(f"files/{file_id}", 6, "0"), "a", FileStatus.PROCESSED, {})
            files.add_file(session, project.id, new, limits=limits)
            if ends is not None:
                begun.set()
                ends.wait(0.5)  # nobody else can end it: the other waits for this commit
            session.commit()

    begun = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(upload, threading.Event())
        assert begun.wait(10)
        with pytest.raises(QuotaExceeded):
            pool.submit(upload).result(10)
        first.result(10)


def test_a_deleted_file_is_gone_but_still_says_where_a_list_goes_on(
    database: Database, settings: Settings, project: Project
) -> None:
    first, second, third = (add_file(database, project, settings) for _ in range(3))
    with database.writing() as session:
        files.delete_file(session, project.id, second.id)
        session.commit()
    with database.writing() as session:
        with pytest.raises(NotFound):
            files.delete_file(session, project.id, second.id)
        listed = files.list_files(session, project.id, Page())
        after = files.list_files(session, project.id, Page(after=second.id))
    assert [file.id for file in listed.rows] == [third.id, first.id]
    assert [file.id for file in after.rows] == [first.id]


def test_a_file_in_use_cannot_be_deleted(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings)
    assert job.training_file is not None
    with database.writing() as session, pytest.raises(InvalidRequest) as caught:
        files.delete_file(session, project.id, job.training_file)
    assert caught.value.code == "file_in_use"
    with database.writing() as session:
        session.execute(update(File).values(expires_at=1.0))
        assert files.hide_expired(session) == 0
        jobs.cancel(session, project.id, job.id)
        files.delete_file(session, project.id, job.training_file)
        session.commit()


def test_a_served_adapter_cannot_be_deleted_before_its_model(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings)
    with database.writing() as session:
        held = lease.claim(session, settings, job.id, "w")
        assert held is not None
        ended.finish(session, held, published(held, *SUCCESS))
        by_form = {result.artifact.form: result.file for result in jobs.list_artifacts(session, project.id, job.id)}
        files.delete_file(session, project.id, by_form[Form.REPORTS].id)
        with pytest.raises(InvalidRequest, match="delete the model"):
            files.delete_file(session, project.id, by_form[Form.ADAPTER_STOCK].id)


def test_results_are_listed_by_purpose(database: Database, settings: Settings, project: Project, base: BaseRow) -> None:
    uploaded = add_file(database, project, settings)
    with database.reading() as session:
        own = files.list_files(session, project.id, Page(), purpose=FilePurpose.FINE_TUNE)
        results = files.list_files(session, project.id, Page(), purpose=FilePurpose.RESULTS)
    assert [file.id for file in own.rows] == [uploaded.id]
    assert results.rows == []


def test_a_job_cannot_read_a_file_that_is_gone(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    file = add_file(database, project, settings)
    request = CreateJob(model="tiny", training_file=file.id)
    with database.writing() as session:
        files.delete_file(session, project.id, file.id)
        with pytest.raises(InvalidRequest) as caught:
            jobs.add_job(session, settings, project, request)
    assert (caught.value.code, caught.value.param) == ("invalid_training_file", "training_file")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("train.jsonl", "train.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\x.jsonl", "x.jsonl"),
        ("a\x00b\r\n\u202ec.jsonl", "abc.jsonl"),
        ("é" * 300, "é" * 255),
    ],
)
def test_a_filename_is_only_a_name(name: str, shown: str) -> None:
    assert files.clean_filename(name) == shown


@given(st.text(max_size=50))
def test_a_cleaned_filename_has_no_path_and_no_marks(name: str) -> None:
    try:
        shown = files.clean_filename(name)
    except InvalidRequest as error:
        assert error.code == "invalid_filename"
        return
    assert not set(shown) & set("/\\\r\n\x00\u202e")
    assert files.clean_filename(shown) == shown

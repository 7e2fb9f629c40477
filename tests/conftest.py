"""The one fixture file: real databases, a real Valkey, real blob stores, and a world to act in.

`--backend production` runs every test against Postgres, Valkey over TCP and an S3 server (support/backends.py); without
it `database_url` still makes the tests of app/core run once per database. Postgres comes from
IMMUNOTUNE_TEST_POSTGRES_URL or from the bundled binaries, and where neither works the header of the run says why it was
left out.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from obstore.store import MemoryStore
from sqlalchemy import make_url

from app.core import models, projects
from app.core.broker import make_celery
from app.core.jobs import ended, lease
from app.core.settings import Settings
from app.core.storage.blobs import BlobStore, open_blobs
from app.core.storage.blobs.folder import FolderBlobs
from app.core.storage.blobs.objects import ObjectBlobs
from app.core.storage.database import Database, TableRow, migrate, open_database
from app.core.storage.tables import BaseRow, Form, Project
from tests.support.backends import BACKEND, NAMES, broker_answers, broker_client, postgres_missing, run_sql
from tests.support.jobs import QUICK, published
from tests.support.waiting import wait_until
from worker.processes import StartedProgram, start, stop

# --- backends --------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "what the tests of the service run against: SQLite and a folder, or Postgres, Valkey over TCP and S3"
    parser.addoption("--backend", choices=NAMES, default=NAMES[0], help=told)


def pytest_configure(config: pytest.Config) -> None:
    BACKEND.name = config.getoption("backend")
    missing = postgres_missing()
    if BACKEND.is_production and missing:
        raise pytest.UsageError(f"--backend production needs Postgres: {missing}")


def pytest_unconfigure() -> None:
    BACKEND.close()


def pytest_report_header() -> str:
    missing = postgres_missing()
    return (
        f"databases: sqlite; Postgres left out: {missing}"
        if missing
        else f"databases: sqlite, postgres; {BACKEND.name}"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    postgres = pytest.param("postgres", marks=pytest.mark.postgres)
    if "database_url" in metafunc.fixturenames:
        asks = "database" in metafunc.fixturenames and "/app/core/" in metafunc.definition.path.as_posix()
        both = ["sqlite", postgres] if asks and postgres_missing() is None else ["sqlite"]
        metafunc.parametrize("database_url", [postgres] if BACKEND.is_production else both, indirect=True)
    if "blobs" in metafunc.fixturenames:
        metafunc.parametrize("blobs", ["s3"] if BACKEND.is_production else ["folder", "object"], indirect=True)


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A migrated, empty database."""
    if request.param == "sqlite":
        target = tmp_path / "test.db"
        shutil.copy(request.getfixturevalue("migrated_sqlite"), target)
        yield f"sqlite:///{target}"
        return
    url = request.getfixturevalue("migrated_postgres")
    # far quicker than TRUNCATE or CREATE DATABASE for tables that hold a few rows
    run_sql(url, "; ".join(f"DELETE FROM {table.name}" for table in reversed(TableRow.metadata.sorted_tables)))
    yield url


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    migrate(Settings(database_url=f"sqlite:///{path}"))
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres: str) -> Iterator[str]:
    url = BACKEND.new_database()
    yield url
    run_sql(postgres, f"DROP DATABASE {make_url(url).database} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgres() -> str:
    """A running Postgres server, by the URL of its `postgres` database."""
    return BACKEND.postgres()


# --- settings, stores, broker ----------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path, database_url: str, broker_folder: Path) -> Settings:
    """Quick leases, folders of this test's own, the session's broker (started by the fixture `broker`)."""
    stored = BACKEND.blobs(tmp_path / "data") | {"database_url": database_url}
    broker = BACKEND.broker(broker_folder)
    return Settings.model_validate({"data": tmp_path / "data", "base": "tiny", "lease": QUICK} | stored | broker)


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    opened = open_database(settings)
    yield opened
    opened.close()


@pytest.fixture
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    """Each store in turn; in memory the object store stands in for S3, which speaks through the same library."""
    if request.param == "s3":
        return open_blobs(Settings(blob_url=BACKEND.new_blobs()))
    return FolderBlobs(tmp_path / "blobs") if request.param == "folder" else ObjectBlobs(MemoryStore())


@pytest.fixture(scope="session")
def broker_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="it-", dir="/tmp"))  # short: it holds a socket
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def broker_process(broker_folder: Path) -> Iterator[StartedProgram]:
    child = start(BACKEND.broker_program(broker_folder))
    named = Settings.model_validate(BACKEND.broker(broker_folder))
    wait_until(lambda: broker_answers(named), seconds=10)
    yield child
    stop([child])


@pytest.fixture
def broker(broker_process: StartedProgram, settings: Settings) -> Celery:
    """The Celery object over an empty, running broker."""
    broker_client(settings).flushall()
    return make_celery(settings)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base that was trained just now, in seconds."""
    from finetuning.bases.tiny import tiny_test_base  # torch: only for the tests that need a model

    return tiny_test_base(tmp_path_factory.mktemp("base") / "tiny")


# --- a world to act in -----------------------------------------------------------------------------------------------


@pytest.fixture
def pepper(settings: Settings) -> bytes:
    return projects.load_pepper(settings)


@pytest.fixture
def keys(database: Database, settings: Settings, pepper: bytes) -> projects.BootstrapKeys:
    """The plain keys of the projects `default` and `baseline`."""
    with database.writing() as session:
        default = projects.bootstrap(session, settings, pepper)
        assert default is not None
        made = projects.BootstrapKeys(default, projects.open_baseline(session, pepper))
        session.commit()
    return made


@pytest.fixture
def project(database: Database, keys: projects.BootstrapKeys, pepper: bytes) -> Project:
    with database.reading() as session:
        return projects.authenticate(session, pepper, keys.default).project


@pytest.fixture
def baseline(database: Database, keys: projects.BootstrapKeys, pepper: bytes) -> Project:
    with database.reading() as session:
        return projects.authenticate(session, pepper, keys.baseline).project


@pytest.fixture
def base(database: Database, settings: Settings) -> BaseRow:
    """The tiny base, ready: its alignment went through a claim and a finish."""
    with database.writing() as session:
        (due,) = models.ensure_base(session, settings)
        held = lease.claim(session, settings, due.id, "worker_of_fixture")
        assert held is not None
        ended.finish(session, held, published(held, Form.ALIGNMENT))
        session.commit()
        return models.get_base(session, held.base_id)

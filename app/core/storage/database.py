"""The database: engine, sessions, the database clock, the base of all rows, keyset pages, migrations.

SQLite and Postgres differ here and nowhere else. Every function of app.core takes a session and never commits: its
caller does, in plain sight, and wakes afterwards.
"""

import hashlib
import operator
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum, unique
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import structlog
from alembic import command
from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    ColumnElement,
    Connection,
    CursorResult,
    Double,
    Engine,
    Index,
    Integer,
    MetaData,
    Select,
    String,
    UniqueConstraint,
    Update,
    create_engine,
    event,
    exc,
    make_url,
    select,
    text,
    tuple_,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, declared_attr, mapped_column
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from app.core.errors import invalid_cursor
from app.core.settings import Settings
from app.core.storage import schema
from app.core.storage.postgres_waits import bound_waits

JsonObject = dict[str, object]
T = TypeVar("T")

# what a driver raises when the database cannot be reached or does not answer in time
DATABASE_DOWN = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError)


log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# A table that must change may be in use: the change then waits for it this often, with pauses in between, because every
# request of the running service waits behind it meanwhile.
_MIGRATION_TRIES = 60
_MIGRATION_PAUSE_SECONDS = 1.0
_MIGRATION_SECONDS = 600.0  # SQLite: how long another writer, such as a migration, may take
_LOCK_NOT_AVAILABLE, _DEADLOCK, _FULL = "55P03", "40P01", "53100"
# how much later than the server's own limit we give up on its answer
_ANSWER_GRACE_SECONDS = 1.0


@unique
class TurnNumber(IntEnum):
    """Advisory locks of Postgres that have a number; every one is here, for two of one number wait for each other."""

    SET_UP = 7300100
    MIGRATION = 7300101
    SWEEP = 7300102


class db_now(FunctionElement[float]):  # noqa: N801  (an SQL function, spelled like one)
    """The database's clock as unix seconds: the only clock that stamps or compares a stored time."""

    type = Double()
    inherit_cache = True


@compiles(db_now, "sqlite")
def _sqlite_now(_element: db_now, _compiler: SQLCompiler, **_options: object) -> str:
    # unixepoch('subsec') is NULL before SQLite 3.42, which would silently void every lease
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(db_now, "postgresql")
def _postgres_now(_element: db_now, _compiler: SQLCompiler, **_options: object) -> str:
    # now() is the start of the transaction, which may have waited for a lock since
    return "(extract(epoch from clock_timestamp())::double precision)"


class json_text(FunctionElement[str]):  # noqa: N801  (an SQL function, spelled like one)
    """The text under a key of a JSON object column; SQLite's own paths cannot spell a key that holds a quote."""

    type = String()
    inherit_cache = True


@compiles(json_text, "sqlite")
def _sqlite_text(element: json_text, compiler: SQLCompiler, **options: Any) -> str:
    column, key = (compiler.process(clause, **options) for clause in element.clauses)
    return f"(SELECT value FROM json_each({column}) WHERE key = {key})"  # noqa: S608  (both are compiled clauses)


@compiles(json_text, "postgresql")
def _postgres_text(element: json_text, compiler: SQLCompiler, **options: Any) -> str:
    column, key = (compiler.process(clause, **options) for clause in element.clauses)
    return f"({column} ->> {key})"


class TableRow(DeclarativeBase):
    """What every table has: an order, an id and a birth. (created_at, seq) is the order of every list."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        JsonObject: JSON(none_as_null=True),
        dict[str, str]: JSON(none_as_null=True),
        list[str]: JSON(none_as_null=True),
        float: Double(),
        int: BigInteger(),
    }

    @declared_attr.directive
    def __table_args__(cls) -> tuple[object, ...]:  # noqa: N805  (the decorator makes it a class method)
        # without autoincrement SQLite may give a deleted row's number to a new row, and cursors would jump
        return (*cls.keys(), {"sqlite_autoincrement": True})

    @classmethod
    def keys(cls) -> tuple[Index | UniqueConstraint, ...]:
        """The table's indexes and unique keys beside `id`."""
        return ()

    # SQLite counts rows by INTEGER PRIMARY KEY only; Postgres should not run out at 2^31 events
    seq: Mapped[int] = mapped_column(BigInteger().with_variant(Integer(), "sqlite"), primary_key=True)
    id: Mapped[str] = mapped_column(String(160), unique=True)
    created_at: Mapped[float] = mapped_column(default=db_now())


R = TypeVar("R", bound=TableRow)


@dataclass(frozen=True)
class Database:
    """An open database. Sessions are context managers that roll back unless `session.commit()` was called."""

    engine: Engine

    def reading(self) -> Session:
        """A session for reads."""
        return Session(self.engine, expire_on_commit=False)

    def writing(self) -> Session:
        """A session that may write; on SQLite it takes the write lock at its first statement."""
        return Session(self.engine.execution_options(write=True), expire_on_commit=False)

    def close(self) -> None:
        """Drop all pooled connections."""
        self.engine.dispose()


@dataclass(frozen=True)
class Page:
    """What part of a list is wanted: at most `limit` rows behind the row `after`."""

    after: str | None = None
    limit: int = 20
    descending: bool = True


@dataclass(frozen=True)
class Listing(Generic[T]):
    """Some rows of a list, and whether more follow."""

    rows: Sequence[T]
    has_more: bool


def has_no_room(error: BaseException) -> bool:
    """Whether one of DATABASE_DOWN says that the database's disk is full: asking again alone does not help."""
    said = error.orig if isinstance(error, exc.DBAPIError) else None
    return getattr(said, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or getattr(said, "sqlstate", None) == _FULL


def open_database(settings: Settings) -> Database:
    """Connect to `settings.database_url`; opens no connection before the first use."""
    return Database(_engine(settings, migrates=False))


def migrate(settings: Settings, revision: str = "head") -> None:
    """Bring the schema to a revision; the one place that changes tables. Safe to repeat.

    Every revision has a transaction of its own, so that no request waits for all of them. Waits for another migration
    to end; a lock of a running service is asked for again and again, each time for no longer than a request may wait
    behind it. Raises RuntimeError when rows point at absent rows afterwards,
    OperationalError when a table stays locked, and WrongSchema where a newer release has been here.
    """
    engine = migration_engine(settings)
    try:
        for step in _when_free(lambda: _steps(engine, revision)):
            _when_free(partial(_migrate, engine, step))
    finally:
        engine.dispose()


def _when_free(ask: Callable[[], T]) -> T:
    for left in reversed(range(_MIGRATION_TRIES)):
        try:
            return ask()
        except exc.OperationalError as error:
            if left == 0 or getattr(error.orig, "sqlstate", None) not in (_LOCK_NOT_AVAILABLE, _DEADLOCK):
                raise
            log.warning("migration.waits", reason="a transaction holds a table that must change", tries_left=left)
            time.sleep(_MIGRATION_PAUSE_SECONDS)
    raise AssertionError("the last try returns or raises")


def _steps(engine: Engine, revision: str) -> list[str]:
    with engine.connect() as connection:
        return schema.steps_to(connection, revision)


def _migrate(engine: Engine, revision: str) -> None:
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            # another migration may take as long as it needs; what comes behind it must not
            connection.execute(text("SET LOCAL lock_timeout = 0"))
            connection.execute(text(f"SELECT pg_advisory_xact_lock({TurnNumber.MIGRATION})"))
            connection.execute(text("RESET lock_timeout"))
        schema.require_known(connection)
        config = schema.migrations()
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        _check_references(connection)


def migration_engine(settings: Settings) -> Engine:
    """An engine for schema changes, whose statements may take as long as they need.

    Without foreign keys: with them, rebuilding a parent table on SQLite deletes its children.
    """
    return _engine(settings, migrates=True).execution_options(write=True)


def one_at_a_time(session: Session | Connection) -> None:
    """Let only one transaction at a time go past this point: for set-up that several processes may start at once.

    A writing session on SQLite already is alone.
    """
    connection = session.connection() if isinstance(session, Session) else session
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({TurnNumber.SET_UP})"))


def try_turn(session: Session, name: str, *, shared: bool = False) -> bool:
    """Take the turn of this name until the transaction ends; False at once when somebody else has it.

    Those who share it exclude only those who do not. A writing session on SQLite has every turn, and whoever comes
    meanwhile waits.
    """
    connection = session.connection()  # on SQLite this begins, and so waits for the write lock
    if connection.dialect.name != "postgresql":
        return True
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), signed=True)
    function = "pg_try_advisory_xact_lock_shared" if shared else "pg_try_advisory_xact_lock"
    return bool(connection.execute(text(f"SELECT {function}(:number)"), {"number": number}).scalar_one())


@contextmanager
def alone(database: Database, number: TurnNumber) -> Iterator[bool]:
    """Whether no other process is inside a block of this number; it ends with the process that holds it, however that
    ends. Nobody waits. On SQLite, where one API process is all there is, always True.
    """
    if database.engine.dialect.name != "postgresql":
        yield True
        return
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        # a lock of the connection, not of a transaction: the work inside may take longer than one may idle
        number_of = {"number": int(number)}
        held = bool(connection.execute(text("SELECT pg_try_advisory_lock(:number)"), number_of).scalar_one())
        try:
            yield held
        finally:
            if held:
                connection.execute(text("SELECT pg_advisory_unlock(:number)"), number_of)


def read_clock(session: Session) -> float:
    """The database's clock, unix seconds."""
    return session.execute(select(db_now())).scalar_one()


def change(session: Session, statement: Update) -> int:
    """Run an UPDATE and say how many rows it changed: the count tells a conditional change whether it won."""
    return cast("CursorResult[object]", session.execute(statement)).rowcount


def fetch_page(
    session: Session, scope: Select[R], table: type[R], page: Page, *shown: ColumnElement[bool]
) -> Listing[R]:
    """One page of `scope` (what the caller owns) in (created_at, seq) order, of those rows that are `shown`.

    The cursor row must lie in `scope` but need not be shown: a deleted file still says where its list goes on.
    Raises InvalidRequest `invalid_cursor`.
    """
    forwards = operator.lt if page.descending else operator.gt
    place = tuple_(table.created_at, table.seq)
    rows = scope.where(*shown)
    if page.after is not None:
        cursor = session.scalars(scope.where(table.id == page.after)).one_or_none()
        if cursor is None:
            raise invalid_cursor()
        rows = rows.where(forwards(place, tuple_(cursor.created_at, cursor.seq)))
    order = (table.created_at.desc(), table.seq.desc()) if page.descending else (table.created_at, table.seq)
    found = session.scalars(rows.order_by(*order).limit(page.limit + 1)).all()
    return Listing(found[: page.limit], len(found) > page.limit)


def _engine(settings: Settings, *, migrates: bool) -> Engine:
    url = make_url(settings.database_url)
    seconds = settings.database_seconds
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(url, _MIGRATION_SECONDS if migrates else seconds, foreign_keys=not migrates)
    milliseconds = int(seconds * 1000)
    limits = f"-c statement_timeout={milliseconds} -c idle_in_transaction_session_timeout=60000"
    if migrates:
        limits = f"-c statement_timeout=0 -c lock_timeout={milliseconds}"
    engine = create_engine(
        url,
        pool_size=10,
        max_overflow=30,
        pool_timeout=seconds,
        pool_pre_ping=True,
        hide_parameters=True,  # an error that is logged must not carry what a row holds
        connect_args={
            "connect_timeout": max(2, int(seconds)),
            "options": limits,
        },
    )
    if not migrates:
        bound_waits(engine, seconds + _ANSWER_GRACE_SECONDS)
    return engine


def _sqlite_engine(url: URL, seconds: float, *, foreign_keys: bool) -> Engine:
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, pool_size=10, max_overflow=30, pool_timeout=seconds, hide_parameters=True)

    def prepare(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself: the begin event below does
        connection.execute(f"PRAGMA busy_timeout={int(seconds * 1000)}")
        connection.execute("PRAGMA journal_mode=WAL")
        # NORMAL would lose the last commits in a power cut, after their requests were answered
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA foreign_keys={'ON' if foreign_keys else 'OFF'}")

    def begin(connection: Connection) -> None:
        # a deferred transaction that writes later fails at once on a stale snapshot, whatever the busy timeout
        writes = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", begin)
    return engine


def _check_references(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        dangling = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        if dangling:
            raise RuntimeError(f"{len(dangling)} rows point at absent rows after migration; nothing was changed.")

"""Migrations from nothing and from every earlier revision, with a row in every table, on both databases."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory
from sqlalchemy.orm import Session

from app.core.settings import Settings
from app.core.storage import schema, tables
from app.core.storage.database import Database, TableRow, migrate, migration_engine, one_at_a_time, open_database
from tests.support.backends import BACKEND, postgres_missing
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[4]
REVISIONS = [found.revision for found in ScriptDirectory(str(ROOT / "migrations")).walk_revisions()]
KINDS = [
    "sqlite",
    pytest.param("postgres", marks=[pytest.mark.postgres, pytest.mark.skipif(bool(postgres_missing()), reason="none")]),
]


@pytest.fixture(params=KINDS)
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings of a database without any table."""
    is_sqlite = request.param == "sqlite"
    url = f"sqlite:///{tmp_path / 'empty.db'}" if is_sqlite else BACKEND.new_database(migrated=False)
    return Settings(data=tmp_path, database_url=url, database_seconds=0.3)


def fill(engine: sa.Engine) -> dict[str, dict[str, object]]:
    """One row in every table there is, by what the database itself says of its columns; the rows by table."""
    found, rows = sa.MetaData(), dict[str, dict[str, object]]()
    with engine.begin() as connection:
        found.reflect(connection)
        for table in found.sorted_tables:
            if table.name != "alembic_version":
                rows[table.name] = {column.name: value_of(column, rows) for column in table.columns}
                connection.execute(table.insert().values(rows[table.name]))
    return rows


def value_of(column: sa.Column[object], rows: dict[str, dict[str, object]]) -> object:
    for key in column.foreign_keys:
        return rows[key.column.table.name][key.column.name]
    match column.type:
        case sa.JSON():
            return {"kept": column.name}
        case sa.Boolean():
            return True
        case sa.Integer():
            return 7
        case sa.Float():
            return 1.5
        case _:
            return f"{column.table.name[:8]} {column.name}"


@pytest.mark.parametrize("revision", REVISIONS)
def test_rows_of_every_table_outlive_the_migration_from_an_earlier_release(empty: Settings, revision: str) -> None:
    """S17: whatever an earlier release stored is there afterwards, unchanged, and today's code can read it."""
    migrate(empty, revision)
    engine = migration_engine(empty)
    rows = fill(engine)
    assert set(rows) >= {"orgs", "jobs", "replies", "models"}
    migrate(empty)
    found = sa.MetaData()
    with engine.connect() as connection:
        found.reflect(connection)
        for name, row in rows.items():
            (kept,) = connection.execute(sa.select(found.tables[name])).mappings()
            assert row.items() <= dict(kept).items()
    engine.dispose()
    database = open_database(empty)
    with database.reading() as session:
        for mapped in TableRow.__subclasses__():
            assert len(session.scalars(sa.select(mapped)).all()) == int(mapped.__tablename__ in rows)
    database.close()


def test_an_empty_database_gets_every_table(empty: Settings) -> None:
    migrate(empty)
    engine = migration_engine(empty)
    made = set(sa.inspect(engine).get_table_names())
    engine.dispose()
    assert made == {*tables.TableRow.metadata.tables, "alembic_version"}


def test_a_migration_may_take_longer_than_a_request(empty: Settings) -> None:
    """S17: requests end after `database_seconds`; an index over a large table takes as long as it takes."""
    engine = migration_engine(empty)
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_sleep(1.0)"))
        else:  # a statement of SQLite has no limit at all
            connection.execute(sa.text("SELECT 1"))
    engine.dispose()


def test_a_second_migration_waits_for_the_first_however_long_it_takes(empty: Settings) -> None:
    """S17: two replicas that start at once both migrate; neither gives up because the other is slow."""
    migrate(empty)
    first = migration_engine(empty)
    with ThreadPoolExecutor(1) as pool:
        with first.begin() as connection:
            lock_as_a_migration_does(connection)
            second = pool.submit(migrate, empty)
            # four times as long as a request may wait
            assert not threading.Event().wait(4 * empty.database_seconds)
            assert not second.done()
        second.result(20)
    first.dispose()


def lock_as_a_migration_does(connection: sa.Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(7300101)"))


def test_a_table_in_use_is_asked_for_again(empty: Settings) -> None:
    """S17: a change waits for a lock only as long as requests may wait behind it, lets them pass, and tries again."""
    migrate(empty)
    database = open_database(empty)
    with ThreadPoolExecutor(1) as pool:
        with database.writing() as session:
            hold_the_version(session)
            changing = pool.submit(migrate, empty)
            if session.get_bind().dialect.name == "postgresql":
                wait_until(lambda: waits(database), seconds=10)
                wait_until(lambda: not waits(database), seconds=10)  # gave up once; requests pass
                assert not changing.done()
        changing.result(30)
    database.close()


def test_a_deadlock_with_a_request_is_tried_again(empty: Settings) -> None:
    """Review, S17: Postgres ends one of two that wait for each other; was that the migration, the start failed."""
    migrate(empty, REVISIONS[-1])
    database, engine = open_database(empty), migration_engine(empty)
    if engine.dialect.name != "postgresql":
        pytest.skip("a migration of SQLite has the database to itself")
    with engine.begin() as connection:
        # the function stands for a transaction that waits for the migration, which no test can time
        connection.execute(sa.text("CREATE SEQUENCE refusals"))
        connection.execute(sa.text(REFUSE_ONCE))
    migrate(empty)
    with database.reading() as session:
        schema.require_newest(session.connection())
    database.close()
    engine.dispose()


REFUSE_ONCE = """
CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
  IF nextval('refusals') = 1 THEN RAISE EXCEPTION 'deadlock' USING ERRCODE = '40P01'; END IF;
END $$;
CREATE EVENT TRIGGER refusing ON ddl_command_start EXECUTE FUNCTION refuse();
"""


def test_each_revision_has_a_transaction_of_its_own(empty: Settings) -> None:
    """Review, S17: requests waited behind all revisions together, for one held its locks until the last had ended."""
    migrate(empty, REVISIONS[-1])
    engine = migration_engine(empty)
    with engine.connect() as connection:
        assert schema.steps_to(connection, "head") == REVISIONS[-2::-1]
        assert schema.steps_to(connection, REVISIONS[0]) == REVISIONS[-2::-1]
    migrate(empty)
    migrate(empty, REVISIONS[-1])  # a revision of before is no step back
    with engine.connect() as connection:
        schema.require_newest(connection)
    engine.dispose()


def hold_the_version(session: Session) -> None:
    one_at_a_time(session)  # what setting up projects takes is no business of migrations
    if session.get_bind().dialect.name == "postgresql":
        session.execute(sa.text("LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE"))


def waits(database: Database) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with database.reading() as session:
        return bool(session.execute(sa.text(query)).scalar_one())

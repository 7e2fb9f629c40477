from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import select, text, update
from sqlalchemy.exc import DBAPIError

from app.core.errors import InvalidRequest
from app.core.ids import Prefix, new_id
from app.core.settings import Settings
from app.core.storage import tables
from app.core.storage.database import Database, Page, fetch_page, migrate, migration_engine, read_clock
from app.core.storage.tables import Job, Org, Project
from tests.support.jobs import add_job

pytestmark = pytest.mark.usefixtures("base")


def test_the_database_clock_runs_in_unix_seconds(database: Database) -> None:
    with database.reading() as session:
        first = read_clock(session)
    with database.reading() as session:
        second = read_clock(session)
    assert 1.7e9 < first <= second < first + 60


def test_migrations_make_what_the_tables_say(settings: Settings) -> None:
    with migration_engine(settings).connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.TableRow.metadata) == []


def test_migrating_twice_keeps_rows(database: Database, settings: Settings, project: Project) -> None:
    migrate(settings)
    with database.reading() as session:
        assert session.scalars(select(Project).where(Project.id == project.id)).one().name == "default"


def test_a_writing_session_that_is_not_committed_leaves_nothing(database: Database) -> None:
    with database.writing() as session:
        session.add(Org(id=new_id(Prefix.ORG), name="gone", slug="gone"))
        session.flush()
    with database.reading() as session:
        assert session.scalars(select(Org).where(Org.slug == "gone")).all() == []


def test_concurrent_writers_lose_no_update(database: Database, settings: Settings, project: Project) -> None:
    job = add_job(database, project, settings)

    def bump(_: int) -> None:
        with database.writing() as session:
            session.execute(select(Project.seq).where(Project.id == project.id).with_for_update())
            losses = session.scalars(select(Job.losses).where(Job.id == job.id)).one()
            session.execute(update(Job).where(Job.id == job.id).values(losses=losses + 1))
            session.commit()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(bump, range(100)))
    with database.reading() as session:
        assert session.scalars(select(Job.losses).where(Job.id == job.id)).one() == 100


def test_pages_hold_each_row_once_while_rows_are_added(
    database: Database, settings: Settings, project: Project
) -> None:
    made = [add_job(database, project, settings).id for _ in range(7)]
    own = select(Job).where(Job.project_id == project.id)
    seen: list[str] = []
    page, more = Page(limit=2), True
    while more:
        with database.reading() as session:
            listing = fetch_page(session, own, Job, page)
        seen += [job.id for job in listing.rows]
        page, more = Page(after=seen[-1], limit=2), listing.has_more
        add_job(database, project, settings)
    assert seen == made[::-1]


def test_an_unknown_cursor_is_an_error(database: Database, project: Project) -> None:
    with database.reading() as session, pytest.raises(InvalidRequest) as caught:
        fetch_page(session, select(Job).where(Job.project_id == project.id), Job, Page(after="ftjob-unknown"))
    assert (caught.value.code, caught.value.param) == ("invalid_cursor", "after")


def test_foreign_keys_are_enforced_and_survive_migration(database: Database, settings: Settings) -> None:
    migrate(settings)
    with database.writing() as session:
        session.add(Project(id=new_id(Prefix.PROJECT), org_id="org-absent", name="orphan", policy="plain"))
        with pytest.raises(Exception, match=r"(?i)foreign key"):
            session.flush()


def test_a_read_does_not_wait_for_an_open_write(database: Database) -> None:
    with database.writing() as writer:
        writer.add(Org(id=new_id(Prefix.ORG), name="open", slug="open"))
        writer.flush()
        with database.reading() as reader:
            assert reader.execute(text("SELECT count(*) FROM orgs WHERE slug = 'open'")).scalar_one() == 0


def test_an_error_of_the_database_does_not_show_what_rows_hold(database: Database) -> None:
    """S24: such an error is logged as it is, on both databases."""
    with database.reading() as session, pytest.raises(DBAPIError) as wrong:
        session.execute(text("SELECT id FROM nothing_here WHERE id = :id"), {"id": "hunter2"})
    assert "hunter2" not in str(wrong.value)

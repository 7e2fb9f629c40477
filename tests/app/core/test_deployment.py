"""Database and blob store: bound at the first start, refused when they do not belong together, swept with care."""

from pathlib import Path

import pytest
from obstore.store import MemoryStore
from prometheus_client import REGISTRY
from sqlalchemy import event, select, update

from app.core import deployment
from app.core.jobs import sweep as sweeping
from app.core.settings import Settings
from app.core.storage.blobs import BlobStore, open_blobs, put_bytes
from app.core.storage.blobs.objects import ObjectBlobs
from app.core.storage.database import Database, TurnNumber, open_database
from app.core.storage.identity import STORE_KEY, WrongDeployment, id_in_store
from app.core.storage.tables import BaseRow, Checkpoint, Deployment, Project
from tests.support.jobs import add_file, add_job


def swept(database: Database, blobs: BlobStore, *, times: int = 2, most_share: float = 0.1) -> int:
    """How many blobs so many sweeps, to which everything is old, deleted."""
    return sum(sweeping.sweep(database, blobs, older_than_seconds=-60, most_share=most_share) for _ in range(times))


@pytest.fixture
def stranger(tmp_path: Path, migrated_sqlite: Path) -> Database:
    """Another database, migrated and empty."""
    (tmp_path / "stranger").mkdir()
    path = tmp_path / "stranger" / "other.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    return open_database(Settings(data=tmp_path / "stranger", database_url=f"sqlite:///{path}"))


def test_a_second_service_deletes_nothing_of_the_first_and_does_not_start(
    database: Database, settings: Settings, project: Project, blobs: BlobStore, stranger: Database
) -> None:
    """S2: a database that knows none of the blobs sweeps none of them, and refuses the store at its start."""
    deployment.bind(database, blobs, settings)
    keys = {add_file(database, project, settings, blobs=blobs).blob_key for _ in range(30)}
    assert swept(stranger, blobs) == 0
    with pytest.raises(WrongDeployment, match="immunotune adopt"):
        deployment.bind(stranger, blobs, settings)
    assert swept(stranger, blobs) == 0
    assert {blob.key for blob in blobs.list("files/")} == keys


def test_the_first_start_makes_one_id_and_later_ones_find_it(
    database: Database, settings: Settings, blobs: BlobStore
) -> None:
    """S2: the id lies in the database and in the store, and stays."""
    made = deployment.bind(database, blobs, settings)
    assert deployment.bind(database, blobs, settings) == made
    assert id_in_store(blobs) == made
    with database.reading() as session:
        assert session.scalars(select(Deployment.id)).all() == [made]


def test_a_first_start_that_ended_before_the_store_was_claimed_is_gone_on_with(
    database: Database, settings: Settings, blobs: BlobStore
) -> None:
    """S2: killed between row and object, the next start claims the store."""
    made = deployment.bind(database, blobs, settings)
    blobs.delete(STORE_KEY)
    with database.writing() as session:
        session.execute(update(Deployment).values(bound_at=None))
        session.commit()
    assert deployment.bind(database, blobs, settings) == made
    assert id_in_store(blobs) == made


def test_an_empty_store_is_refused_by_a_database_in_use(
    database: Database, settings: Settings, project: Project, blobs: BlobStore
) -> None:
    """S2: a wrong IMMUNOTUNE_BLOB_URL is refused, also where that store is empty."""
    deployment.bind(database, blobs, settings)
    with pytest.raises(WrongDeployment, match="IMMUNOTUNE_BLOB_URL"):
        deployment.bind(database, ObjectBlobs(MemoryStore()), settings)


def test_two_empty_databases_do_not_share_a_store(
    database: Database, settings: Settings, blobs: BlobStore, stranger: Database
) -> None:
    """S2: the second first start on one store is refused, before any byte is in it."""
    deployment.bind(database, blobs, settings)
    with pytest.raises(WrongDeployment, match="belongs to deployment"):
        deployment.bind(stranger, blobs, settings)


def test_bytes_of_an_earlier_release_are_not_taken_over_by_an_empty_database(
    database: Database, settings: Settings, blobs: BlobStore
) -> None:
    """S2: a non-empty store with an empty database is refused."""
    put_bytes(blobs, "files/proj_x/file-x", b"x")
    with pytest.raises(WrongDeployment, match="knows of no job and no file"):
        deployment.bind(database, blobs, settings)


def test_a_data_folder_of_an_earlier_release_is_taken_over_where_it_matches(
    database: Database, settings: Settings, project: Project, tmp_path: Path, database_url: str
) -> None:
    """S2: one folder, rows and bytes that match: nothing to configure; where most bytes are missing it is refused."""
    blobs = open_blobs(settings)
    kept = [add_file(database, project, settings, blobs=blobs) for _ in range(3)]
    if not database_url.startswith("sqlite"):
        with pytest.raises(WrongDeployment, match="earlier release"):
            deployment.bind(database, blobs, settings)
        return
    one_folder = settings.model_copy(update={"data": tmp_path})
    blobs.delete(kept[0].blob_key)
    with pytest.raises(WrongDeployment, match="1 are missing"):
        deployment.bind(database, blobs, one_folder)
    put_bytes(blobs, kept[0].blob_key, b"back")
    for number in range(5):  # more than rows name, and few: uploads that were cut off (review)
        put_bytes(blobs, f"files/proj_x/file-{number}", b"x")
    deployment.bind(database, blobs, one_folder)
    assert swept(database, blobs) == 5


def test_nothing_is_swept_after_an_adoption_until_an_audit_passes(
    database: Database, settings: Settings, project: Project, blobs: BlobStore
) -> None:
    """S2: `adopt` binds what was restored, `audit` lets the sweep go on once nothing is missing, or is accepted."""
    deployment.bind(database, blobs, settings)
    file = add_file(database, project, settings, blobs=blobs)
    put_bytes(blobs, "files/proj_x/file-orphan", b"x")
    blobs.delete(file.blob_key)
    adopted = deployment.adopt(database, blobs)
    assert deployment.bind(database, blobs, settings) == adopted
    assert swept(database, blobs) == 0
    found = deployment.check(database, blobs, most_share=0.1)
    assert (found.needed, found.missing, found.total, found.unknown) == (1, 1, 1, 1)
    assert swept(database, blobs) == 0
    put_bytes(blobs, file.blob_key, b"back")
    assert deployment.check(database, blobs, most_share=0.1).missing == 0
    assert swept(database, blobs) == 1


def test_a_store_that_was_adopted_elsewhere_is_left_alone(
    database: Database, settings: Settings, project: Project, blobs: BlobStore, stranger: Database
) -> None:
    """S2: a process that began before the adoption sweeps nothing any more."""
    deployment.bind(database, blobs, settings)
    put_bytes(blobs, "files/proj_x/file-orphan", b"x")
    assert swept(database, blobs, times=1) == 0
    deployment.adopt(stranger, blobs)
    assert swept(database, blobs) == 0


def test_a_database_that_was_set_back_is_refused_and_sweeps_nothing(
    database: Database, settings: Settings, project: Project, blobs: BlobStore
) -> None:
    """S2: a backup carries the deployment's id, so the count of sweeps tells it; `adopt` and an audit end that."""
    deployment.bind(database, blobs, settings)
    put_bytes(blobs, "files/proj_x/file-orphan", b"x")
    swept(database, blobs, times=1)
    with database.writing() as session:  # as a backup from before that sweep
        session.execute(update(Deployment).values(sweeps=0))
        session.commit()
    with pytest.raises(WrongDeployment, match="restored"):
        deployment.bind(database, blobs, settings)
    assert swept(database, blobs, times=3) == 0
    deployment.adopt(database, blobs)
    deployment.check(database, blobs, most_share=0.1)
    deployment.bind(database, blobs, settings)
    assert swept(database, blobs) == 1


def test_a_copy_of_the_database_in_use_stops_the_sweep_for_both(
    database: Database, settings: Settings, project: Project, blobs: BlobStore, stranger: Database
) -> None:
    """S2: staging made of a copy of production's database deletes nothing of what production stored since."""
    own = deployment.bind(database, blobs, settings)
    with stranger.writing() as session:
        session.add(Deployment(id=own, bound_at=1.0))
        session.commit()
    keys = {add_file(database, project, settings, blobs=blobs).blob_key for _ in range(5)}
    for _ in range(3):
        for each in (stranger, database):
            assert swept(each, blobs, times=1) == 0
    assert {blob.key for blob in blobs.list("files/")} == keys
    deployment.check(database, blobs, most_share=0.1)
    assert swept(stranger, blobs) == 0


def test_the_sweep_stops_where_much_of_the_store_is_nobodys(
    database: Database, settings: Settings, project: Project, blobs: BlobStore
) -> None:
    """S2: more than a share of the store without any row alarms and deletes nothing."""
    deployment.bind(database, blobs, settings)
    for number in range(40):
        put_bytes(blobs, f"jobs/ftjob-absent/1/result/{number}", b"x")
    assert swept(database, blobs, times=3) == 0
    assert REGISTRY.get_sample_value("immunotune_sweep_stopped") == 1
    assert len(list(blobs.list("jobs/"))) == 40
    assert swept(database, blobs, times=1, most_share=1.0) == 40
    assert REGISTRY.get_sample_value("immunotune_sweep_stopped") == 0


def test_a_sweep_asks_in_few_statements(
    database: Database, settings: Settings, project: Project, blobs: BlobStore
) -> None:
    """S38: 600 blobs cost a handful of statements, not two or three each."""
    deployment.bind(database, blobs, settings)
    for number in range(600):
        put_bytes(blobs, f"jobs/ftjob-absent-{number % 50}/1/result/{number}", b"x")
    statements: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *words: statements.append(words[2]))
    swept(database, blobs, times=1)
    assert len(statements) < 40


def test_one_process_sweeps_at_a_time_and_in_turn(database: Database, settings: Settings, blobs: BlobStore) -> None:
    """S38: the next process has to wait for its turn, and on Postgres nobody sweeps beside another."""
    deployment.bind(database, blobs, settings)
    put_bytes(blobs, "files/proj_x/file-orphan", b"x")
    limits = settings.limits.model_copy(update={"orphan_blob_seconds": 0.0})
    eager = settings.model_copy(update={"limits": limits})

    def again(seconds: float) -> int:
        with database.writing() as session:
            session.execute(update(Deployment).values(swept_at=Deployment.swept_at - seconds))
            session.commit()
        return sweeping.sweep_in_turn(database, blobs, eager)

    assert sweeping.sweep_in_turn(database, blobs, eager) == 0  # it marks
    assert again(1) == 0
    if database.engine.dialect.name == "postgresql":
        with sweeping.alone(database, TurnNumber.SWEEP) as elected:
            assert elected
            assert again(limits.sweep_seconds) == 0
    assert again(limits.sweep_seconds) == 1


def test_an_audit_misses_no_checkpoint_that_was_condemned(
    database: Database, settings: Settings, project: Project, base: BaseRow, blobs: BlobStore
) -> None:
    """Review, S2: its bytes may be gone, which is why it was condemned; each audit failed until the job had ended."""
    job = add_job(database, project, settings)
    made = {"job_id": job.id, "fence": 1, "metrics": {}, "fingerprint": "print"}
    with database.writing() as session:
        missing = sweeping.audit(session, blobs).missing
        session.add(Checkpoint(id="ftckpt-1", step=10, prefix="jobs/a/1/checkpoints/10", unusable_at=1.0, **made))
        session.commit()
        assert sweeping.audit(session, blobs).missing == missing
        session.add(Checkpoint(id="ftckpt-2", step=20, prefix="jobs/a/1/checkpoints/20", **made))
        session.commit()
        assert sweeping.audit(session, blobs).missing == missing + 1

import pytest
from sqlalchemy import update

from app.core import idempotency
from app.core.errors import InvalidRequest, RequestInProgress
from app.core.idempotency import Repeat
from app.core.storage.database import Database
from app.core.storage.tables import Project, Reply

HASH, OTHER = "a" * 64, "b" * 64


def store(database: Database, repeat: Repeat, name: str = "first") -> None:
    with database.writing() as session:
        idempotency.store(session, repeat, status=200, body={"id": name})
        session.commit()


def found(database: Database, repeat: Repeat) -> object:
    with database.reading() as session:
        reply = idempotency.lookup(session, repeat)
    return reply and reply.body["id"]


def test_a_counted_retry_gets_the_stored_reply_and_a_first_attempt_does_not(
    database: Database, project: Project
) -> None:
    store(database, Repeat(project.id, "POST /v1/x", HASH))
    assert found(database, Repeat(project.id, "POST /v1/x", HASH, retry_count=1)) == "first"
    assert found(database, Repeat(project.id, "POST /v1/x", HASH)) is None
    assert found(database, Repeat(project.id, "POST /v1/x", OTHER, retry_count=1)) is None
    assert found(database, Repeat(project.id, "POST /v1/y", HASH, retry_count=1)) is None


def test_a_retry_gets_the_newest_of_equal_requests(database: Database, project: Project) -> None:
    store(database, Repeat(project.id, "r", HASH), "first")
    store(database, Repeat(project.id, "r", HASH), "second")
    assert found(database, Repeat(project.id, "r", HASH, retry_count=1)) == "second"


def test_another_project_sees_nothing(database: Database, project: Project, baseline: Project) -> None:
    store(database, Repeat(project.id, "r", HASH, key="k"))
    assert found(database, Repeat(baseline.id, "r", HASH, retry_count=1)) is None
    assert found(database, Repeat(baseline.id, "r", HASH, key="k")) is None


def test_a_key_replays_its_own_body_only(database: Database, project: Project) -> None:
    store(database, Repeat(project.id, "r", HASH, key="k"))
    assert found(database, Repeat(project.id, "r", HASH, key="k")) == "first"
    with pytest.raises(InvalidRequest) as caught:
        found(database, Repeat(project.id, "r", OTHER, key="k"))
    assert caught.value.code == "idempotency_key_reused"


@pytest.mark.parametrize("key", ["", "k" * 256, "ключ", "a\n"])
def test_an_unusable_key_is_an_error(database: Database, project: Project, key: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        found(database, Repeat(project.id, "r", HASH, key=key))
    assert caught.value.code == "invalid_idempotency_key"


def test_the_second_effect_under_one_key_is_refused(database: Database, project: Project) -> None:
    store(database, Repeat(project.id, "r", HASH, key="k"))
    with pytest.raises(RequestInProgress):
        store(database, Repeat(project.id, "r", HASH, key="k"))


def test_old_replies_are_forgotten(database: Database, project: Project) -> None:
    store(database, Repeat(project.id, "r", HASH, key="k"))
    with database.writing() as session:
        session.execute(update(Reply).values(created_at=Reply.created_at - idempotency.RETRY_SECONDS - 1))
        session.commit()
    assert found(database, Repeat(project.id, "r", HASH, retry_count=1)) is None
    assert found(database, Repeat(project.id, "r", HASH, key="k")) == "first"
    with database.writing() as session:
        session.execute(update(Reply).values(created_at=Reply.created_at - idempotency.KEY_SECONDS))
        session.commit()
    assert found(database, Repeat(project.id, "r", HASH, key="k")) is None
    store(database, Repeat(project.id, "r", OTHER, key="k"), "second")
    with database.writing() as session:
        assert idempotency.forget_old(session) == 0
    assert found(database, Repeat(project.id, "r", OTHER, key="k")) == "second"

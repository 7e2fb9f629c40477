import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
        reply = idempotency.reserve(session, repeat)
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


@pytest.mark.parametrize("named", [{"key": "k"}, {"retry_count": 1}])
def test_a_repeat_that_overlaps_the_first_never_acts(
    database: Database, project: Project, named: dict[str, Any]
) -> None:
    """S3: while the first request is being answered, a repeat waits for its reply or is told to come back."""
    first = Repeat(project.id, "r", HASH, key=named.get("key"))
    repeat, ended = Repeat(project.id, "r", HASH, **named), threading.Event()

    def again() -> object:
        try:
            with database.writing() as session:
                reply = idempotency.reserve(session, repeat)
                return reply and reply.body["id"]
        except RequestInProgress as told:
            return told.retry_after
        finally:
            ended.set()

    with ThreadPoolExecutor(1) as pool, database.writing() as session:
        assert idempotency.reserve(session, first) is None
        answer = pool.submit(again)
        ended.wait(0.5)  # SQLite lets nobody else write meanwhile, so there it cannot end before the commit
        idempotency.store(session, first, status=200, body={"id": "first"})
        session.commit()
        assert answer.result(10) in ("first", 1.0)
    with database.writing() as session:
        reply = idempotency.reserve(session, repeat)
        assert reply is not None
        assert reply.body == {"id": "first"}


def test_two_first_attempts_do_not_hold_each_other_up(database: Database, project: Project) -> None:
    """S3: equal requests that are no repeats are two requests, also while both are being answered."""
    with database.writing() as session:
        assert idempotency.reserve(session, Repeat(project.id, "r", HASH)) is None
        if session.get_bind().dialect.name == "postgresql":  # SQLite has one writer at a time
            with database.writing() as other:
                assert idempotency.reserve(other, Repeat(project.id, "r", HASH)) is None


def test_another_key_of_the_project_sees_nothing(database: Database, project: Project) -> None:
    """S3: requests are the same under one API key, not under one project."""
    mine, other = Repeat(project.id, "r", HASH, "key_a", "k"), Repeat(project.id, "r", OTHER, "key_b", "k")
    store(database, mine)
    assert found(database, other) is None
    assert found(database, Repeat(project.id, "r", HASH, "key_b", retry_count=1)) is None
    store(database, other, "second")
    assert (found(database, mine), found(database, other)) == ("first", "second")


def test_a_reply_of_the_release_before_is_still_replayed(database: Database, project: Project) -> None:
    """S3: what 0.1 stored names neither the API key nor its hash; a retry across the upgrade still gets it."""
    with database.writing() as session:
        old = {"project_id": project.id, "route": "r", "body_hash": HASH, "status": 200}
        session.add(Reply(id="req_old", key="k", body={"id": "old"}, **old))
        session.commit()
    assert found(database, Repeat(project.id, "r", HASH, "key_a", "k")) == "old"
    assert found(database, Repeat(project.id, "r", HASH, "key_a", retry_count=1)) == "old"


def test_a_long_answer_is_reserved_until_it_is_there_or_given_up(database: Database, project: Project) -> None:
    """S3: an answer that takes minutes is reserved by a row; a process that dies holds it no longer than it said."""
    repeat = Repeat(project.id, "r", HASH, key="k")

    def begin(seconds: float = 60.0) -> Reply:
        with database.writing() as session:
            reply = idempotency.open_pending(session, repeat, seconds=seconds)
            session.commit()
            return reply

    with database.writing() as session:
        idempotency.withdraw(session, begin().id)
        session.commit()
    begin(seconds=-1.0)
    mine = begin()
    assert idempotency.is_pending(mine)
    with pytest.raises(RequestInProgress):
        begin()
    with database.writing() as session:
        idempotency.complete(session, mine.id, {"id": "first"})
        session.commit()
    reply = begin()
    assert (idempotency.is_pending(reply), reply.body) == (False, {"id": "first"})

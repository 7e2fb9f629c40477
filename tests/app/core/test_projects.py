import stat

import pytest
from pydantic import SecretStr
from sqlalchemy import select, update

from app.core import projects
from app.core.errors import InvalidApiKey
from app.core.settings import Settings
from app.core.storage.database import Database, db_now
from app.core.storage.tables import ApiKey


def test_a_key_names_its_project_org_and_scopes(
    database: Database, keys: projects.BootstrapKeys, pepper: bytes
) -> None:
    with database.reading() as session:
        default = projects.authenticate(session, pepper, keys.default)
        baseline = projects.authenticate(session, pepper, keys.baseline)
    assert (default.project.name, default.project.policy, default.org.slug) == ("default", "immunotune", "local")
    assert (baseline.project.name, baseline.project.policy) == ("baseline", "plain")
    assert default.scopes == frozenset(projects.SCOPES)


def test_bootstrap_can_be_repeated(
    database: Database, settings: Settings, keys: projects.BootstrapKeys, pepper: bytes
) -> None:
    with database.writing() as session:
        assert projects.bootstrap(session, settings, pepper) == keys
        assert len(session.scalars(select(ApiKey)).all()) == 2


def test_the_services_policy_is_that_of_the_default_project_from_the_next_start(
    database: Database, settings: Settings, keys: projects.BootstrapKeys, pepper: bytes
) -> None:
    asked = settings.model_copy(update={"policy": "as_asked"})
    with database.writing() as session:
        assert projects.bootstrap(session, asked, pepper) == keys
        found = [projects.authenticate(session, pepper, key).project.policy for key in (keys.default, keys.baseline)]
    assert found == ["as_asked", "plain"]


def test_an_operators_own_key_opens_the_default_project(
    database: Database, settings: Settings, keys: projects.BootstrapKeys, pepper: bytes
) -> None:
    own = settings.model_copy(update={"api_key": SecretStr("my-own-key-of-some-length")})
    with database.writing() as session:
        assert projects.bootstrap(session, own, pepper).default == "my-own-key-of-some-length"
        holder = projects.authenticate(session, pepper, "my-own-key-of-some-length")
        assert holder.project.name == "default"


def test_a_changed_key_revokes_the_one_before(
    database: Database, settings: Settings, keys: projects.BootstrapKeys, pepper: bytes
) -> None:
    own = settings.model_copy(update={"api_key": SecretStr("my-own-key-of-some-length")})
    with database.writing() as session:
        projects.bootstrap(session, own, pepper)
        with pytest.raises(InvalidApiKey):
            projects.authenticate(session, pepper, keys.default)
        assert projects.authenticate(session, pepper, keys.baseline).project.name == "baseline"
        projects.bootstrap(session, settings, pepper)
        assert projects.authenticate(session, pepper, keys.default).project.name == "default"
        with pytest.raises(InvalidApiKey):
            projects.authenticate(session, pepper, "my-own-key-of-some-length")


@pytest.mark.parametrize("wrong", ["", "sk-proj-", "sk-proj-" + "x" * 43, "\udcff", "ключ"])
def test_a_wrong_key_is_refused(database: Database, keys: projects.BootstrapKeys, pepper: bytes, wrong: str) -> None:
    with database.reading() as session, pytest.raises(InvalidApiKey):
        projects.authenticate(session, pepper, wrong)


def test_a_revoked_key_is_refused(database: Database, keys: projects.BootstrapKeys, pepper: bytes) -> None:
    with database.writing() as session:
        session.execute(update(ApiKey).values(revoked_at=db_now()))
        session.commit()
    with database.reading() as session, pytest.raises(InvalidApiKey):
        projects.authenticate(session, pepper, keys.default)


def test_the_table_holds_no_key(database: Database, keys: projects.BootstrapKeys, pepper: bytes) -> None:
    with database.reading() as session:
        row = session.scalars(select(ApiKey).order_by(ApiKey.seq)).first()
    assert row is not None
    assert keys.default not in (row.hash, row.id)
    assert row.hint == keys.default[-6:]
    with database.reading() as session, pytest.raises(InvalidApiKey):
        projects.authenticate(session, b"another server's pepper", keys.default)


def test_secrets_on_disk_are_for_the_owner_alone(settings: Settings, keys: projects.BootstrapKeys) -> None:
    folder = settings.data / "keys"
    assert {path.name for path in folder.iterdir()} == {"pepper", "default", "baseline"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700

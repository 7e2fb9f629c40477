import stat
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy import select, update

from app.core import projects
from app.core.errors import InvalidApiKey
from app.core.settings import Settings
from app.core.storage.blobs import open_blobs
from app.core.storage.database import Database, db_now
from app.core.storage.tables import ApiKey, Project
from tests.support.jobs import bind_as_it_is


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
        assert projects.bootstrap(session, settings, pepper) == keys.default
        assert len(session.scalars(select(ApiKey)).all()) == 2


def test_the_services_policy_is_that_of_the_default_project_from_the_next_start(
    database: Database, settings: Settings, keys: projects.BootstrapKeys, pepper: bytes
) -> None:
    asked = settings.model_copy(update={"policy": "as_asked"})
    with database.writing() as session:
        assert projects.bootstrap(session, asked, pepper) == keys.default
        found = [projects.authenticate(session, pepper, key).project.policy for key in (keys.default, keys.baseline)]
    assert found == ["as_asked", "plain"]


OWN = "my-own-key-of-some-length-and-more"


def test_an_operators_own_key_opens_the_default_project(database: Database, settings: Settings, pepper: bytes) -> None:
    own = settings.model_copy(update={"api_key": SecretStr(OWN)})
    with database.writing() as session:
        assert projects.bootstrap(session, own, pepper) == OWN
        assert projects.authenticate(session, pepper, OWN).project.name == "default"


def test_a_restart_makes_and_revokes_no_key(
    database: Database, settings: Settings, keys: projects.BootstrapKeys, pepper: bytes
) -> None:
    """S8: another configured key is refused at the start, and the one that is in use goes on to open."""
    own = settings.model_copy(update={"api_key": SecretStr(OWN)})
    with database.writing() as session, pytest.raises(projects.UnknownKey, match="immunotune rekey"):
        projects.bootstrap(session, own, pepper)
    with database.reading() as session:
        assert projects.authenticate(session, pepper, keys.default).project.name == "default"


def test_a_new_key_revokes_the_ones_before_for_good(
    database: Database, settings: Settings, keys: projects.BootstrapKeys, pepper: bytes
) -> None:
    """S8: no restart and no second `rekey` with an old configuration opens a revoked key again."""
    own = settings.model_copy(update={"api_key": SecretStr(OWN)})
    old = settings.model_copy(update={"api_key": SecretStr(keys.default)})
    with database.writing() as session:
        assert projects.new_key(session, own, pepper) == OWN
        assert projects.new_key(session, own, pepper) == OWN
        assert projects.authenticate(session, pepper, OWN).project.name == "default"
        assert projects.authenticate(session, pepper, keys.baseline).project.name == "baseline"
        session.commit()
    for again in (projects.bootstrap, projects.new_key):
        with database.writing() as session, pytest.raises(projects.UnknownKey):
            again(session, old, pepper)
    with database.writing() as session:
        assert projects.bootstrap(session, settings, pepper) is None  # the kept one opens nothing
        with pytest.raises(InvalidApiKey):
            projects.authenticate(session, pepper, keys.default)


def test_only_the_demo_opens_the_undefended_project(database: Database, settings: Settings, pepper: bytes) -> None:
    """S8: a start makes no `baseline`, and each demo voids the key of the one before."""
    with database.writing() as session:
        projects.bootstrap(session, settings, pepper)
        assert session.scalars(select(Project.name)).all() == ["default"]
        first, second = projects.open_baseline(session, pepper), projects.open_baseline(session, pepper)
        assert projects.authenticate(session, pepper, second).project.policy == "plain"
        with pytest.raises(InvalidApiKey):
            projects.authenticate(session, pepper, first)
    assert not (settings.data / "keys" / "baseline").exists()


def test_a_host_with_another_pepper_does_not_start_and_locks_nobody_out(
    database: Database, settings: Settings, keys: projects.BootstrapKeys, pepper: bytes, tmp_path: Path
) -> None:
    """S8: the second host's own pepper is refused, and with that of the first in a file it accepts the same key."""
    blobs = open_blobs(settings)
    bind_as_it_is(database, blobs)
    with database.writing() as session:
        projects.bind_pepper(session, settings, pepper)
        session.commit()
    host = settings.model_copy(update={"data": tmp_path / "host", "api_key": SecretStr(keys.default)})
    with database.writing() as session, pytest.raises(projects.WrongPepper, match="IMMUNOTUNE_PEPPER_FILE"):
        projects.bind_pepper(session, host, projects.load_pepper(host))
    shared = host.model_copy(update={"pepper_file": settings.data / "keys" / "pepper"})
    told = host.model_copy(update={"pepper": SecretStr((settings.data / "keys" / "pepper").read_text())})
    for its in (shared, told):
        with database.writing() as session:
            projects.bind_pepper(session, its, projects.load_pepper(its))
            assert projects.bootstrap(session, its, projects.load_pepper(its)) == keys.default
    with database.reading() as session:
        assert projects.authenticate(session, pepper, keys.default).project.name == "default"


def test_a_strangers_pepper_does_not_become_the_deployments(
    database: Database, settings: Settings, keys: projects.BootstrapKeys, pepper: bytes, tmp_path: Path
) -> None:
    """S8: with keys of an earlier release, the first start has to show that its pepper made one; `rekey` ends that."""
    bind_as_it_is(database, open_blobs(settings))
    host = settings.model_copy(update={"data": tmp_path / "host"})
    with database.writing() as session, pytest.raises(projects.WrongPepper, match="immunotune rekey"):
        projects.bind_pepper(session, host, projects.load_pepper(host))
    with database.writing() as session:
        projects.bind_pepper(session, settings, pepper)
        session.commit()
    with database.writing() as session:
        fresh = projects.new_key(session, host, projects.load_pepper(host))
        projects.bind_pepper(session, host, projects.load_pepper(host))
        assert projects.authenticate(session, projects.load_pepper(host), fresh).project.name == "default"
        assert session.scalars(select(ApiKey.seq).where(ApiKey.revoked_at.is_(None))).all() != []
        for key in (keys.default, keys.baseline):
            with pytest.raises(InvalidApiKey):
                projects.authenticate(session, pepper, key)


@pytest.mark.parametrize("secret", ["", "sixteen-chars-ok", "x" * 31])
def test_short_secrets_are_refused(secret: str, tmp_path: Path) -> None:
    """S8: a key or pepper that can be guessed stops the start."""
    for name in ("api_key", "pepper"):
        with pytest.raises(ValidationError, match="at least 32"):
            Settings.model_validate({"data": tmp_path, name: secret})
    (tmp_path / "pepper").write_text(secret)
    with pytest.raises(projects.WrongPepper, match="at least 32"):
        projects.load_pepper(Settings(data=tmp_path, pepper_file=tmp_path / "pepper"))


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
    assert {path.name for path in folder.iterdir()} == {"pepper", "default"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700

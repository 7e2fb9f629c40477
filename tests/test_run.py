"""The one door: what it passes on, and that a broken start mends itself."""

import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

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


def test_every_verb_of_a_service_brings_the_postgres_client_but_no_server(door: ModuleType) -> None:
    for verb in ("up", "serve", "worker", "models", "migrate"):
        wanted = door.requirements_of(door.VERBS[verb][0])
        assert any(requirement.startswith("psycopg") for requirement in wanted)
        assert not any("pgserver" in requirement for requirement in wanted)

"""What CONTRIBUTING.md and docs/architecture.md ask of the tree itself."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from app.core.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "demo" / "rows"
PACKAGES = ("app", "worker", "finetuning", "embedded", "demo", "immunotune")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES, MOST_IN_A_ROOM = 400, 40, 12
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "service"}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_can_be_read_in_one_sitting(module: Path) -> None:
    source = module.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MOST_LINES
    assert module.stem not in BANNED_NAMES
    tree = ast.parse(source)
    assert not source.strip() or ast.get_docstring(tree), "a module says what it knows"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MOST_FUNCTION_LINES, f"{node.name} is too long"


@pytest.mark.parametrize(
    "module", ["app.main", "worker.tasks", "worker.checks", "embedded.__main__", "immunotune.__main__"]
)
def test_processes_that_do_not_train_do_not_import_torch(module: str) -> None:
    probe = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=False).returncode == 0


def test_every_requirement_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = {_plain(re.split(r"[\[=<>; ]", line)[0]) for lines in lists for line in lines}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {_plain(line.split("==")[0]) for line in lines if line and not line.startswith("#")}
    assert wanted <= pinned


def test_the_compose_file_starts_nothing_before_the_migrations_and_holds_no_secret() -> None:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    services = yaml.safe_load(text)["services"]
    for name in ("api", "checks", "trainer", "models"):
        assert services[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    for service in services.values():
        if "build" in service:
            recipe = (ROOT / service["build"]["dockerfile"]).read_text(encoding="utf-8")
            assert "\nUSER immunotune\n" in recipe
    for line in text.splitlines():
        name, _, value = line.strip().partition(": ")
        if re.search("PASSWORD|SECRET|API_KEY", name) and not line.strip().startswith("#"):
            # without a value the variable is handed through from outside, and stays unset where it is unset
            from_outside = not value or value.startswith("${") or (name.endswith("_FILE") and value.startswith("/run/"))
            assert from_outside, f"{name} must come from outside"


@pytest.mark.parametrize("judge", ["", "llama-guard-3-8b", "llama-guard-3-8b+granite-guardian-3.1-2b"])
@pytest.mark.parametrize("rows", [None, "/var/lib/immunotune/rows.jsonl"])
def test_compose_passes_judge_and_operator_rows_to_training_and_to_nobody_else(
    judge: str, rows: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    ours = {"IMMUNOTUNE_JUDGE", "IMMUNOTUNE_OPERATOR_ROWS"}
    assert [name for name, service in services.items() if ours & service.get("environment", {}).keys()] == ["trainer"]
    outside = {"IMMUNOTUNE_JUDGE": judge} | ({"IMMUNOTUNE_OPERATOR_ROWS": rows} if rows else {})
    for name in [name for name in os.environ if name.startswith("IMMUNOTUNE_")]:
        monkeypatch.delenv(name)
    for name, value in _inside(services["trainer"]["environment"], outside).items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert (settings.judge, settings.operator_rows) == (judge, Path(rows) if rows else None)
    # guards are found below HOME, the one such variable that a training process gets: it must outlive the container
    assert Path(services["trainer"]["environment"]["HOME"]) == settings.data


def _inside(environment: dict[str, str | None], outside: dict[str, str]) -> dict[str, str]:
    """What a container gets: ${NAME:-default} and ${NAME:?complaint} filled in, and no value passed through if set."""
    given = {name: value if value is not None else outside.get(name) for name, value in environment.items()}
    pattern = re.compile(r"\$\{(\w+):[-?]([^}]*)\}")
    return {
        name: pattern.sub(lambda found: outside.get(found[1]) or found[2], value)
        for name, value in given.items()
        if value is not None
    }


def test_the_ticket_files_are_what_their_generator_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "examples" / "make_tickets.py"), str(tmp_path)], check=True)
    for name in ("tickets_train.jsonl", "tickets_test.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROWS / name).read_bytes()


def test_training_and_test_tickets_share_no_wording_and_no_object() -> None:
    prompts = [
        {json.loads(line)["messages"][0]["content"] for line in (ROWS / name).read_text().splitlines()}
        for name in ("tickets_train.jsonl", "tickets_test.jsonl")
    ]
    assert not prompts[0] & prompts[1]
    assert len(prompts[0]) >= 160
    assert len(prompts[1]) == 96


def test_the_readme_shows_the_quick_start_that_ships() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert shown is not None
    assert (ROOT / "examples" / "sdk_quickstart.py").read_text(encoding="utf-8").endswith(shown[1])


def test_every_document_that_is_linked_exists() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

"""The wheel by itself: what is in it, and that it works in an environment that knows nothing of this source tree."""

import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import sysconfig
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from immunotune.verbs import VERBS
from tests.support.processes import descendants, is_gone
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"app", "worker", "finetuning", "embedded", "demo", "immunotune"}
PART_SECONDS = 90.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


class Installed:
    """An environment with the wheel in it, a user's home, and a folder of theirs that holds packages of our names."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.venv, self.home, self.elsewhere = folder / "venv", folder / "home", folder / "elsewhere"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(self.venv)], check=True)
        quiet = ("--quiet", "--no-deps", "--no-index", "--no-compile")
        pip = [sys.executable, "-m", "pip", "--python", str(self.venv / "bin" / "python"), "install", *quiet]
        subprocess.run([*pip, str(wheel)], check=True)
        self.site = next(self.venv.glob("lib/python*/site-packages"))
        # everybody else's packages; the .pth files that lie there, ours to the source tree among them, are not read
        (self.site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self.home.mkdir()
        for name in ("app", "demo", "migrations"):
            (self.elsewhere / name).mkdir(parents=True)
            (self.elsewhere / name / "__init__.py").write_text("raise RuntimeError('not this one')")

    @property
    def data(self) -> Path:
        return self.home / ".local" / "share" / "immunotune"

    def start(self, *words: str, output: IO[bytes] | None = None, **variables: str) -> subprocess.Popen[bytes]:
        kept = {name: os.environ[name] for name in ("PATH", "TMPDIR", "LANG") if name in os.environ}
        return subprocess.Popen(
            [str(self.venv / "bin" / words[0]), *words[1:]],
            cwd=self.elsewhere,
            env={**kept, "HOME": str(self.home), **variables},
            stdout=output or subprocess.PIPE,
            stderr=subprocess.STDOUT if output else subprocess.PIPE,
        )

    def run(self, *words: str) -> str:
        process = self.start(*words)
        shown, errors = process.communicate(timeout=PART_SECONDS)
        assert process.returncode == 0, errors.decode()
        return shown.decode()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder))
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    return next(folder.glob("immunotune-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def test_the_wheel_holds_the_packages_with_the_migrations_inside_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {str(path) for package in PACKAGES for path in _files(package)}
    assert names == sources | {f"app/{path}" for path in _files("migrations")}
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {"demo/rows/tickets_train.jsonl", "demo/rows/tickets_test.jsonl", "app/migrations/env.py"} <= names


def _files(folder: str) -> Iterator[Path]:
    for path in (ROOT / folder).rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            yield path.relative_to(ROOT)


def test_what_runs_is_what_was_installed(installed: Installed) -> None:
    places = installed.run("python", "-P", "-c", f"import {', '.join(PACKAGES)}, app; print(app.__file__)")
    assert Path(places.strip()) == installed.site / "app" / "__init__.py"
    paths = installed.run("python", "-P", "-c", "import sys; print(*sys.path, sep='\\n')").splitlines()
    assert str(ROOT) not in paths


def test_a_training_process_gets_no_path_that_comes_before_the_standard_library(installed: Installed) -> None:
    program = "from pathlib import Path; from worker.attempt.launch import launch_command as launch; "
    shown = installed.run("python", "-P", "-c", program + "print('PYTHONPATH' in launch(Path('/x'), 'run').env)")
    assert shown.strip() == "False"


def test_the_command_lists_its_verbs(installed: Installed) -> None:
    shown = installed.run("immunotune", "--help")
    assert re.findall(r"^  (\w+) ", shown, re.MULTILINE) == list(VERBS)


def test_migrate_makes_the_tables_in_the_users_data_folder(installed: Installed) -> None:
    installed.run("immunotune", "migrate")
    installed.run("immunotune", "migrate")
    with sqlite3.connect(installed.data / "immunotune.db") as database:
        assert database.execute("SELECT count(*) FROM jobs").fetchone() == (0,)
        assert database.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)


def test_serve_answers_and_is_itself_the_process_to_stop(installed: Installed, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    installed.run("immunotune", "migrate")
    with (tmp_path / "serve.log").open("wb") as output:
        process = installed.start("immunotune", "serve", output=output, IMMUNOTUNE_PORT=str(port))
    try:
        wait_until(lambda: _answers(f"http://127.0.0.1:{port}/readyz"), seconds=PART_SECONDS)
        process.terminate()
        process.wait(timeout=PART_SECONDS)
    finally:
        process.kill()
    assert not _answers(f"http://127.0.0.1:{port}/healthz")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@pytest.fixture
def demo(installed: Installed, tiny_base: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The demo with its defaults on a base that is here already, and the file that it prints to."""
    shutil.copytree(tiny_base, installed.data / "bases" / "tiny", dirs_exist_ok=True)
    log = tmp_path / "demo.log"
    with log.open("wb") as output:
        process = installed.start("immunotune", "demo", "--base", "tiny", output=output)
    yield process, log
    process.kill()
    process.wait(timeout=30)


def test_the_demo_serves_trains_and_ends_clean(
    demo: tuple[subprocess.Popen[bytes], Path], installed: Installed
) -> None:
    process, log = demo

    def printed(pattern: str) -> re.Match[str] | None:
        assert process.poll() is None, log.read_text()
        return re.search(pattern, log.read_text())

    wait_until(lambda: printed(r"the service answers at \S+/v1\n"), seconds=PART_SECONDS)
    answers = printed(r"the service answers at (\S+)/v1\n")
    assert answers is not None
    assert _answers(f"{answers[1]}/readyz")
    # a training process of the wheel has said how far it is
    wait_until(lambda: printed(r"aligning tiny .* left  align \d+ %"), seconds=PART_SECONDS)
    started = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PART_SECONDS) == 130, log.read_text()
    wait_until(lambda: all(is_gone(pid) for pid in started), seconds=10)
    assert (installed.data / "demo" / "files" / "train.jsonl").stat().st_size > 0

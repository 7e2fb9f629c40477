"""Programs end with their parent, and take their own children along; a child ends at the end of its input."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import is_gone
from tests.support.waiting import wait_until
from worker.processes import Program, inherited_environment, start, stop, tail

ROOT = Path(__file__).resolve().parents[2]
# starts a program and says its pid, then waits to be killed
PARENT = """
import sys
from pathlib import Path
from worker.processes import Program, inherited_environment, start
started = start(Program("sleeper", ["sleep", "600"], inherited_environment(), Path(sys.argv[1])))
print(started.process.pid, flush=True)
sys.stdin.read()
"""
CHILD = """
import sys, threading
from worker.processes import exit_at_end_of_input
exit_at_end_of_input(7)
print("ready", flush=True)
if sys.argv[1] == "wait":
    threading.Event().wait()
sys.exit(threading.active_count() - 1)
"""


def program(tmp_path: Path, *argv: str, grace_seconds: float = 5.0) -> Program:
    return Program("program", argv, inherited_environment(), tmp_path / "logs" / "program.log", grace_seconds)


def child(*argv: str, stdin: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *argv], cwd=ROOT, stdin=stdin, stdout=subprocess.PIPE, text=True
    )


def test_a_program_dies_with_a_killed_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "log")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not is_gone(pid)
    parent.kill()
    parent.wait(timeout=10)
    wait_until(lambda: is_gone(pid), seconds=10)


def test_stop_lets_a_program_end_by_itself(tmp_path: Path) -> None:
    started = start(program(tmp_path, sys.executable, "-c", "import signal; signal.pause()"))
    stop([started])
    assert started.process.returncode == -signal.SIGTERM


def test_stop_kills_a_deaf_program_and_its_children(tmp_path: Path) -> None:
    deaf = "trap '' TERM; sleep 600 & echo $! >&1; while :; do wait; done"
    started = start(program(tmp_path, "sh", "-c", deaf, grace_seconds=0.3))
    wait_until(lambda: tail(started.program.log) != "", seconds=10)
    grandchild = int(tail(started.program.log))
    stop([started])
    assert started.process.returncode == -signal.SIGKILL
    wait_until(lambda: is_gone(grandchild), seconds=10)


def test_stop_kills_what_a_program_that_ended_has_left(tmp_path: Path) -> None:
    started = start(program(tmp_path, "sh", "-c", "sleep 600 & echo $!"))
    wait_until(lambda: not started.is_alive, seconds=10)
    left = int(tail(started.program.log))
    assert not is_gone(left)
    stop([started])
    wait_until(lambda: is_gone(left), seconds=10)


def test_a_child_ends_when_the_pipe_to_its_parent_does() -> None:
    process = child("wait", stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=20) == 7


@pytest.mark.parametrize("empty", [os.devnull, __file__])
def test_an_input_that_is_no_pipe_says_nothing_about_the_parent(empty: str) -> None:
    with Path(empty).open("rb") as stdin:
        process = child("end", stdin=stdin.fileno())
    assert process.wait(timeout=20) == 0


def test_tail_shows_the_last_lines_only(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(str(i) for i in range(100)), encoding="utf-8")
    assert tail(log).splitlines()[-1] == "99"
    assert len(tail(log).splitlines()) < 20
    assert tail(tmp_path / "absent") == ""


def test_what_a_service_writes_is_its_users_alone(tmp_path: Path) -> None:
    """S33: database, rows and blobs were readable to every user of the machine."""
    environment = {**inherited_environment(), "IMMUNOTUNE_DATA": str(tmp_path / "data"), "IMMUNOTUNE_BASE": "tiny"}
    argv = [sys.executable, "-m", "embedded", "migrate"]
    before = os.umask(0o022)
    try:
        subprocess.run(argv, cwd=ROOT, env=environment, check=True, capture_output=True)
    finally:
        os.umask(before)
    written = list((tmp_path / "data").rglob("*"))
    assert written
    assert [path for path in (tmp_path / "data", *written) if path.stat().st_mode & 0o077] == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lets a process close itself")
@pytest.mark.parametrize(("verb", "dumpable"), [("worker", 0), ("serve", 0), ("models", 0), ("up", 0), ("train", 1)])
def test_what_runs_with_the_services_secrets_cannot_be_read_by_its_users_other_programs(
    verb: str, dumpable: int, tmp_path: Path
) -> None:
    """S14: /proc/<pid>/environ gave database URL and cloud key to every program of the user; a researcher's training
    stays open to debuggers."""
    program = (
        "import ctypes, os, sys; from embedded.__main__ import _settings_for\n"
        "_settings_for(sys.argv[1])\n"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), 'IMMUNOTUNE_DATABASE_PASSWORD' in os.environ)"
    )
    environment = {
        **inherited_environment(),
        "IMMUNOTUNE_DATA": str(tmp_path),
        "IMMUNOTUNE_DATABASE_PASSWORD": "secret",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, verb], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    is_kept = verb in ("models", "train")  # they read their settings themselves, later
    assert done.stdout.split() == [str(dumpable), str(is_kept)]

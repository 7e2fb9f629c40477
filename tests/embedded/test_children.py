import os
import signal
import subprocess
import sys
from pathlib import Path

from embedded.children import Part, start, stop, tail
from tests.conftest import wait_until
from tests.support.processes import is_gone

ROOT = Path(__file__).resolve().parents[2]
# starts a part and says its pid, then waits to be killed
PARENT = """
import os, sys
from pathlib import Path
from embedded.children import Part, start
child = start(Part("sleeper", ["sleep", "600"], dict(os.environ), Path(sys.argv[1])))
print(child.process.pid, flush=True)
sys.stdin.read()
"""


def _part(tmp_path: Path, *argv: str, grace_seconds: float = 5.0) -> Part:
    return Part("part", argv, dict(os.environ), tmp_path / "logs" / "part.log", grace_seconds)


def test_a_part_dies_with_a_killed_parent(tmp_path: Path) -> None:
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


def test_stop_lets_a_part_end_by_itself(tmp_path: Path) -> None:
    child = start(_part(tmp_path, sys.executable, "-c", "import signal; signal.pause()"))
    stop([child])
    assert child.process.returncode == -signal.SIGTERM


def test_stop_kills_a_deaf_part_and_its_children(tmp_path: Path) -> None:
    deaf = "trap '' TERM; sleep 600 & echo $! >&1; while :; do wait; done"
    child = start(_part(tmp_path, "sh", "-c", deaf, grace_seconds=0.3))
    wait_until(lambda: tail(child.part.log) != "", seconds=10)
    grandchild = int(tail(child.part.log))
    stop([child])
    assert child.process.returncode == -signal.SIGKILL
    wait_until(lambda: is_gone(grandchild), seconds=10)


def test_tail_shows_the_last_lines_only(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(str(i) for i in range(100)), encoding="utf-8")
    assert tail(log).splitlines()[-1] == "99"
    assert len(tail(log).splitlines()) < 20
    assert tail(tmp_path / "absent") == ""

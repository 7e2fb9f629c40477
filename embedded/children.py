"""Child processes that cannot outlive us: start, watch, stop.

Knows the operating system; must not know what the children are. Start children from the main thread only: Linux ties
the parent-death signal to the thread that forked, and a child of a finished thread would die with it.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from worker.attempt.launch import die_with_parent

TAIL_LINES = 12


@dataclass(frozen=True)
class Part:
    """One program of the running system; `grace_seconds` is how long it may take to stop by itself."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log: Path
    grace_seconds: float = 5.0


@dataclass(frozen=True)
class Child:
    """A started part. Its process leads a session of its own, so a Ctrl-C in the terminal reaches only us."""

    part: Part
    process: subprocess.Popen[bytes]

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None


def start(part: Part) -> Child:
    """Start a part with its output appended to its log. Raises OSError when the program cannot be run."""
    part.log.parent.mkdir(parents=True, exist_ok=True)
    with part.log.open("ab") as log:
        process = subprocess.Popen(
            part.argv,
            env=dict(part.env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_dying_with(os.getpid()),  # noqa: PLW1509 - we start children before any thread
        )
    return Child(part, process)


def stop(children: Sequence[Child]) -> None:
    """Ask all children to end, in parallel; what is still there after its grace is killed with its whole group."""
    begin = time.monotonic()
    for child in children:
        if child.is_alive:
            child.process.send_signal(signal.SIGTERM)
    for child in children:
        left = child.part.grace_seconds - (time.monotonic() - begin)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(timeout=max(0.0, left))
        kill([child])


def kill(children: Sequence[Child]) -> None:
    """End children at once, with whatever their sessions still hold."""
    for child in children:
        _kill_group(child.process.pid)
        child.process.wait()


def tail(log: Path) -> str:
    """The last lines of a log, for a person who asks why a part ended."""
    if not log.exists():
        return ""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # the group is empty already; macOS answers EPERM for that


def _dying_with(parent: int) -> Callable[[], None]:
    def prepare() -> None:
        die_with_parent()
        if os.getppid() != parent:  # the parent ended before the request was made: nobody would ever end us
            os._exit(1)

    return prepare

"""Child processes that cannot outlive us: started in groups of their own, stopped with all that they started.

The first half is for the parent (start, stop, kill), the second for the child (die_with_parent, exit_at_end_of_input).
Start programs from the main thread only: Linux ties the parent-death signal to the thread that forked, and the child
of a finished thread would die with it.
"""

import contextlib
import ctypes
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TAIL_LINES = 12
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4  # <linux/prctl.h>


@dataclass(frozen=True)
class Program:
    """What to start; `env` is its whole environment, `grace_seconds` how long it may take to stop by itself."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log: Path
    grace_seconds: float = 5.0


@dataclass(frozen=True)
class StartedProgram:
    """A started program. Its process leads a session of its own, so a Ctrl-C in the terminal reaches only us."""

    program: Program
    process: subprocess.Popen[bytes]

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None


def start(program: Program) -> StartedProgram:
    """Start a program with its output appended to its log. Raises OSError when it cannot be run."""
    program.log.parent.mkdir(parents=True, exist_ok=True)
    with program.log.open("ab") as log:
        process = subprocess.Popen(
            program.argv,
            env=dict(program.env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_dying_with(os.getpid()),  # noqa: PLW1509 - we start programs before any thread
        )
    return StartedProgram(program, process)


def stop(programs: Sequence[StartedProgram]) -> None:
    """Ask all programs to end, in parallel; what is still there after its grace is killed with its whole group."""
    begin = time.monotonic()
    for started in programs:
        if started.is_alive:
            started.process.terminate()
    for started in programs:
        left = started.program.grace_seconds - (time.monotonic() - begin)
        end_group(started.process, timeout_seconds=max(0.0, left))


def kill(programs: Sequence[StartedProgram]) -> None:
    """End programs at once, with whatever their groups still hold."""
    for started in programs:
        end_group(started.process, timeout_seconds=0.0)


def end_group(process: subprocess.Popen[bytes], *, timeout_seconds: float) -> int:
    """Wait for the end of a group's leader, kill what is left of the group then, and return the exit status."""
    try:
        process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    # macOS answers EPERM where nobody is left in the group
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def tail(log: Path) -> str:
    """The last lines of a log, for a person who asks why a program ended."""
    if not log.exists():
        return ""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])


def inherited_environment() -> dict[str, str]:
    """A copy of our own environment, to be passed on to a child process.

    Settings are not read from it: `load_settings` does that. This is for PATH, LD_LIBRARY_PATH, CUDA_VISIBLE_DEVICES
    and the like, which other people's programs need.
    """
    return dict(os.environ)


def keep_to_ourselves() -> None:
    """Close our memory and environment, where secrets lie, to other processes of our user, write no core dump, and
    files that only our user can open.

    The first does not bind a superuser, and a program that we execute starts without it; it inherits the rest.
    """
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that forked it ends (Linux; elsewhere a no-op)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def exit_at_end_of_input(status: int) -> None:
    """From now on, end this process with `status` when its standard input is a pipe and reaches its end.

    Whoever started us holds the other end for as long as they live. A terminal or /dev/null says nothing about them.
    """
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(os.fstat(0).st_mode):
            threading.Thread(target=_read_to_the_end, args=(status,), name="parent-watch", daemon=True).start()


def _read_to_the_end(status: int) -> None:
    while os.read(0, 4096):
        pass
    os._exit(status)


def _dying_with(parent: int) -> Callable[[], None]:
    def prepare() -> None:
        die_with_parent()
        if os.getppid() != parent:  # the parent ended before the request was made: nobody would ever end us
            os._exit(1)

    return prepare

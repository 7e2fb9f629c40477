"""What the kernel says of processes; Linux only, like the parent-death signal that these tests are about."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def is_gone(pid: int) -> bool:
    """Whether the process has ended; a zombie has, its status is merely not asked for yet."""
    return _state(pid) in ("", "Z")


def descendants(pid: int) -> set[int]:
    """The live processes below `pid`."""
    children: dict[int, set[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _fields(int(entry.name))
        if fields and fields[0] != "Z":
            children.setdefault(int(fields[1]), set()).add(int(entry.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), set())
        found |= below
        waiting += below
    return found


def children_of(pid: int) -> set[int]:
    """The live processes that `pid` itself started."""
    below = descendants(pid)
    return below - {further for child in below for further in descendants(child)}


@contextmanager
def suspended(pid: int, *, alone: bool = False) -> Iterator[None]:
    """The process and, unless `alone`, all below it stand still (SIGSTOP) for the length of the block."""
    stopped: list[int] = []
    try:
        # until nobody is left who could have forked
        while still := ({pid} | (set() if alone else descendants(pid))) - set(stopped):
            for one in sorted(still):
                with suppress(ProcessLookupError):
                    os.kill(one, signal.SIGSTOP)
                stopped.append(one)
        yield
    finally:
        for one in stopped:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGCONT)


def _state(pid: int) -> str:
    fields = _fields(pid)
    return fields[0] if fields else ""


def _fields(pid: int) -> list[str]:
    """State, parent and so on: what follows the program's name, which may itself hold spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []

"""The training process with an attacker's code where the pipeline stands: it tries what it must not be able to do."""

import errno
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from finetuning.contract.progress import Note, Progress
from worker import train

TARGETS = json.loads(os.environ["SPY_TARGETS"])


def _outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as refusal:
        return errno.errorcode.get(refusal.errno or 0, "?")
    return "done"


def _connect() -> None:
    with socket.create_connection(("127.0.0.1", TARGETS["port"]), timeout=5):
        pass


def _spy(scratch: Path, **_: object) -> Iterator[Progress]:
    parent = os.getppid()
    tried: dict[str, Callable[[], object]] = {
        "parent's environment": lambda: Path(f"/proc/{parent}/environ").read_bytes(),
        "parent's memory": lambda: os.close(os.open(f"/proc/{parent}/mem", os.O_RDONLY)),
        "signal to the parent": lambda: os.kill(parent, 0),
        "network": _connect,
        "own environment": lambda: Path("/proc/self/environ").read_bytes(),
        "write scratch": lambda: (scratch / "result.bin").write_bytes(b"x"),
        "write base": lambda: (Path(TARGETS["base"]) / "config.json").write_bytes(b"x"),
        "write elsewhere": lambda: Path(TARGETS["elsewhere"]).write_bytes(b"x"),
    }
    for name in TARGETS["read"]:
        tried[name] = Path(TARGETS["read"][name]).read_bytes
    for name, attempt in tried.items():
        yield Note(level="info", code=name, message=_outcome(attempt))


train._progress = _spy  # type: ignore[assignment]
sys.exit(train.main(sys.argv[1:]))

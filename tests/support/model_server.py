"""A real model server process over a tiny base, for tests."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tests.support.backends import BACKEND

SECRET = "the-gateways-secret-of-these-tests"


@dataclass
class ModelServer:
    """A started process and where it listens."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def headers(self) -> dict[str, str]:
        """What the gateway says."""
        return {"Authorization": f"Bearer {SECRET}"}

    def open_asks(self) -> int:
        return int(httpx2.get(self.url + "/health", timeout=10).json()["open"])


@contextmanager
def model_server(base: Path, data: Path, *, port: int = 0) -> Iterator[ModelServer]:
    """Run `worker.serving.server` on `base`, with the blobs of `data`; ready when the block begins.

    At the end its input closes, as when its parent dies; every such server that a test has not killed must then end by
    itself.
    """
    port = port or free_port()
    argv = [sys.executable, "-m", "worker.serving.server", "--port", str(port), "--base", str(base)]
    stored = {f"IMMUNOTUNE_{name.upper()}": str(value) for name, value in BACKEND.storage(data).items()}
    own = {"IMMUNOTUNE_DATA": str(data), "IMMUNOTUNE_MODEL_SERVER_SECRET": SECRET, "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **stored, **own}
    with (data / "model-server.log").open("ab") as log:
        process = subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log)
    server = ModelServer(f"http://127.0.0.1:{port}", process)
    try:
        _wait_until_it_answers(server, data)
        yield server
        if process.poll() is None:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_it_answers(server: ModelServer, data: Path) -> None:
    deadline = time.monotonic() + 150
    with httpx2.Client(transport=httpx2.HTTPTransport(retries=8)) as client:
        while server.process.poll() is None and time.monotonic() < deadline:
            try:
                if client.get(server.url + "/health").status_code == 200:
                    return
            except httpx2.TransportError:
                continue
    raise AssertionError((data / "model-server.log").read_text()[-3000:])

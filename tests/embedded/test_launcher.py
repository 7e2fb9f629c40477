"""`./run up` for real: it answers, and leaves no process behind however it ends."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.support.backends import BACKEND
from tests.support.processes import descendants, is_gone
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
# broker, API, two workers with one pool process each, model server
FEWEST_PROCESSES = 7

pytestmark = [pytest.mark.kill, pytest.mark.slow, pytest.mark.timeout(300)]


class Service:
    """A running `up`, with the address and key that it printed."""

    def __init__(self, data: Path, base: Path) -> None:
        shutil.copytree(base, data / "bases" / "tiny")
        stored = {f"IMMUNOTUNE_{name.upper()}": str(value) for name, value in BACKEND.storage(data).items()}
        environment = {**os.environ, **stored, "IMMUNOTUNE_DATA": str(data), "IMMUNOTUNE_PORT": "0"}
        environment["IMMUNOTUNE_BASE"] = "tiny"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "embedded", "up"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        printed = dict(
            line.strip().split("=", 1) for line in (self.process.stdout.readline() for _ in range(2)) if line
        )
        assert printed, self.process.stderr.read() if self.process.stderr else ""
        self.client = OpenAI(base_url=printed["OPENAI_BASE_URL"], api_key=printed["OPENAI_API_KEY"])

    def processes(self) -> set[int]:
        return descendants(self.process.pid)


@pytest.fixture
def service(tmp_path: Path, tiny_base: Path) -> Iterator[Service]:
    service = Service(tmp_path, tiny_base)
    yield service
    service.process.kill()
    service.process.wait(timeout=30)


def test_up_answers_and_a_kill_leaves_no_process(service: Service) -> None:
    assert service.client.models.list().data[0].id == "tiny"
    wait_until(lambda: len(service.processes()) >= FEWEST_PROCESSES, seconds=START_SECONDS)
    # the alignment's training process is the deepest one: it must go too
    wait_until(lambda: any(_runs(pid, "worker.train") for pid in service.processes()), seconds=START_SECONDS)
    started = service.processes()
    service.process.kill()
    wait_until(lambda: all(is_gone(pid) for pid in started), seconds=20)


def test_up_starts_a_dead_part_again_and_ends_clean_on_a_signal(service: Service) -> None:
    wait_until(lambda: len(service.processes()) >= FEWEST_PROCESSES, seconds=START_SECONDS)
    api = next(pid for pid in service.processes() if _runs(pid, "serve"))
    os.kill(api, signal.SIGKILL)
    wait_until(lambda: any(_runs(pid, "serve") for pid in service.processes() - {api}), seconds=30)
    assert service.client.with_options(max_retries=10).models.list().data[0].id == "tiny"
    started = service.processes()
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(timeout=90) == 0
    wait_until(lambda: all(is_gone(pid) for pid in started), seconds=5)


def _runs(pid: int, word: str) -> bool:
    try:
        return word in Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return False

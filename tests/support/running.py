"""A service made of real processes over the backend of this run: broker, workers with the stand-in, and an API.

What may be killed has the pid that its `start_...` returned. Without an API, jobs go to the database directly and the
reaper works in the test's own process.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import httpx2
import openai
from celery import Celery

from app.core import broker
from app.core.broker import RUN_JOB, Wake
from app.core.jobs.reaper import Reaper
from app.core.settings import EdgeSettings, LeaseSettings, to_environment
from app.core.storage.job_states import JobState
from app.core.storage.tables import Form
from tests.support.backends import BACKEND, broker_answers, free_port
from tests.support.base_folder import make_base
from tests.support.http import chat_rows
from tests.support.programs.child import advance, begin
from tests.support.waiting import wait_until
from tests.support.worlds import ROWS, Scene, open_scene, pid_in, recipe, settings_in
from worker.attempt.launch import SOURCE_ROOT
from worker.processes import Program, StartedProgram, start, stop

PROGRAMS = Path(__file__).with_name("programs")
SECONDS = 90.0
SLOW = {"step_seconds": 0.05}


class Running:
    """The processes of one service, each started when a test asks for it; `started[0]` is the first broker."""

    def __init__(self, folder: Path, runtime: Path, timings: LeaseSettings, **changes: object) -> None:
        """`changes` go over the settings."""
        values: dict[str, object] = {"port": free_port(), "edge": EdgeSettings(requests_per_minute=100_000)}
        settings = settings_in(folder / "data", runtime=runtime, lease=timings, **(values | changes))
        self.folder = folder
        self.scene: Scene = open_scene(settings)
        self.celery: Celery = broker.make_celery(settings)
        self.reaper: Reaper | None = None
        self.pid_file = folder / "child.pid"
        self.started: list[StartedProgram] = []
        self.start_broker()

    def start_broker(self) -> StartedProgram:
        settings = self.scene.settings
        child = self._start(BACKEND.broker_program(settings.runtime))
        wait_until(lambda: broker_answers(settings), seconds=SECONDS)
        return child

    def forget_messages(self) -> None:
        """Remove the file of a broker that does not run."""
        shutil.rmtree(self.scene.settings.runtime / "broker")

    def start_worker(
        self, *, queues: str = "train.cpu", env: Mapping[str, str] | None = None, **script: object
    ) -> StartedProgram:
        """A worker whose training processes follow the script; `env` goes over its environment."""
        scripted = json.dumps({"pid_file": str(self.pid_file), **SLOW, **script})
        argv = (sys.executable, "-P", str(PROGRAMS / "worker.py"), scripted, queues)
        log = self.scene.settings.data / "worker.log"
        return self._start(Program("worker", argv, self.environment() | dict(env or {}), log, grace_seconds=40.0))

    def start_reaper(self) -> None:
        """The part of an API that helps jobs along, in this process."""
        self.reaper = Reaper(self.scene.database, self.celery, self.scene.blobs, self.scene.settings)
        self.reaper.start()

    def start_api(self, env: Mapping[str, str] | None = None) -> StartedProgram:
        """Start the API, which reaps too; returns when it is ready. `env` goes over its environment."""
        base = self.scene.settings.data / "bases" / "tiny"
        if not base.exists():
            make_base(base)
        argv = (sys.executable, "-P", "-m", "embedded", "serve")
        child = self._start(
            Program("API", argv, self.environment() | dict(env or {}), self.scene.settings.data / "api.log")
        )
        wait_until(self.is_ready, seconds=SECONDS)
        return child

    def is_ready(self) -> bool:
        """Whether the API says that it can serve."""
        try:
            return httpx2.get(f"{self.url}/readyz", verify=False, timeout=5.0).status_code == 200
        except httpx2.TransportError:
            return False

    @property
    def url(self) -> str:
        """Where the API answers, if it does."""
        return f"http://127.0.0.1:{self.scene.settings.port}"

    @property
    def key(self) -> str:
        """The key of the project `default`, once an API has started."""
        return (self.scene.settings.data / "keys" / "default").read_text().strip()

    @contextmanager
    def client(self, *, timeout: float = 30.0) -> Iterator[httpx2.Client]:
        """Asks the API as the project `default`, once per question."""
        headers = {"Authorization": f"Bearer {self.key}"}
        with httpx2.Client(base_url=f"{self.url}/v1", headers=headers, timeout=timeout, verify=False) as http:
            yield http

    def sdk(self, *, max_retries: int) -> openai.OpenAI:
        """The unmodified SDK, for the project `default`."""
        plain = openai.DefaultHttpxClient(verify=False)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=max_retries, http_client=plain)

    def upload(self) -> str:
        """The id of a new file of good rows."""
        with self.client() as http:
            reply = http.post("/files", files={"file": ("a.jsonl", chat_rows(12))}, data={"purpose": "fine-tune"})
        return str(reply.json()["id"])

    def environment(self) -> dict[str, str]:
        return dict(os.environ) | to_environment(self.scene.settings) | {"PYTHONPATH": str(SOURCE_ROOT)}

    def submit(self, *, steps: int = 40) -> str:
        job_id = self.scene.add_job(recipe(steps=steps, save_every=10))
        broker.wake(self.celery, Wake(RUN_JOB, job_id, "train.cpu"))
        return job_id

    def wait_for_state(self, job_id: str, state: JobState) -> None:
        wait_until(lambda: self.scene.job(job_id).state == state, seconds=SECONDS)

    def wait_for_checkpoint(self, job_id: str) -> int:
        """Returns the training process that has just saved."""
        wait_until(lambda: self.scene.checkpoints(job_id), seconds=SECONDS)
        return pid_in(self.pid_file)()

    def adapter(self, job_id: str) -> bytes:
        folder = self.scene.settings.data
        return self.scene.unpacked(self.scene.artifacts(job_id)[Form.ADAPTER], folder)["adapter_model.safetensors"]

    def assert_same_as_undisturbed(self, job_id: str) -> None:
        """The job ends well, with no loss of its own, and its result is that of one that nothing happened to."""
        self.wait_for_state(job_id, JobState.SUCCEEDED)
        assert self.scene.job(job_id).losses == 0
        other = self.submit()
        self.wait_for_state(other, JobState.SUCCEEDED)
        assert self.scene.job(other).losses == 0
        assert self.adapter(job_id) == self.adapter(other)

    def assert_ends_as_ever(self, job_id: str, *, steps: int = 40) -> None:
        """The job ends well, with no loss of its own, once, and with the bytes that a run of `steps` has by itself."""
        self.wait_for_state(job_id, JobState.SUCCEEDED)
        assert self.scene.job(job_id).losses == 0
        assert self.scene.messages(job_id).count("The job has successfully completed") == 1
        assert self.adapter(job_id) == reduce(advance, range(steps), begin(ROWS)).encode()

    def close(self) -> None:
        if self.reaper is not None:
            self.reaper.stop()
        stop(self.started)
        self.celery.close()
        self.scene.database.close()

    def _start(self, program: Program) -> StartedProgram:
        self.started.append(start(program))
        return self.started[-1]


@contextmanager
def running(folder: Path, timings: LeaseSettings, **changes: object) -> Iterator[Running]:
    """A service of its own below `folder`, with its broker started; no process of it is left after the block."""
    runtime = Path(tempfile.mkdtemp(prefix="it-", dir="/tmp"))  # short: it holds a socket
    service = Running(folder, runtime, timings, **changes)
    try:
        yield service
    finally:
        service.close()
        shutil.rmtree(runtime, ignore_errors=True)

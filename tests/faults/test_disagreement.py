"""Two replicas with different settings: whoever disagrees with its deployment does not start, and says what to do."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import text

from app.core.jobs import jobs
from app.core.settings import Settings, to_environment
from tests.support.apis import new_customer, serving
from tests.support.backends import BACKEND
from tests.support.http import Customer, Served
from tests.support.waiting import wait_until
from tests.support.worlds import settings_in
from worker.attempt.launch import SOURCE_ROOT
from worker.processes import StartedProgram

pytestmark = [pytest.mark.slow]

SECONDS = 60.0
VERBS = {"API": ("serve",), "worker": ("worker", "--queues", "checks"), "model server": ("models",)}
ALL = tuple(VERBS)


@dataclass(frozen=True)
class Disagreement:
    """What a second process is set to, what the database is made to say meanwhile, who must refuse, and the advice."""

    says: str
    changes: Callable[[Path], dict[str, object]] = lambda _folder: {}
    revision: str | None = None
    refuse: tuple[str, ...] = ALL


def other_store(folder: Path) -> dict[str, object]:
    return {"blob_url": BACKEND.new_blobs() if BACKEND.is_production else (folder / "other").as_uri()}


CASES = {
    "store": Disagreement("Set IMMUNOTUNE_DATABASE_URL and IMMUNOTUNE_BLOB_URL", other_store),
    "base": Disagreement("run `immunotune retire tiny` once", lambda _: {"base": "smollm2"}),
    "pepper": Disagreement("Set IMMUNOTUNE_PEPPER_FILE", lambda _: {"pepper": "p" * 40}, refuse=("API",)),
    "schema of an earlier release": Disagreement("Run `immunotune migrate` once with this release", revision="0001"),
    "schema of a later release": Disagreement("Start that release here, too", revision="9999"),
}


@pytest.fixture
def first(tmp_path: Path, broker_folder: Path, broker_process: StartedProgram) -> Iterator[Customer]:
    """A customer of the replica that came first."""
    assert broker_process.is_alive
    settings = settings_in(tmp_path / "data", runtime=broker_folder)
    with serving(settings) as served:
        yield from new_customer(served)


@contextmanager
def at_revision(served: Served, revision: str | None) -> Iterator[None]:
    """While this lasts the database says that its tables are of this revision."""
    if revision is None:
        yield
        return
    with served.database.writing() as session:
        (before,) = session.scalars(text("SELECT version_num FROM alembic_version")).all()
    write_revision(served, revision)
    yield
    write_revision(served, before)


def write_revision(served: Served, revision: str) -> None:
    with served.database.writing() as session:
        session.execute(text("UPDATE alembic_version SET version_num = :now"), {"now": revision})
        session.commit()


def begin(settings: Settings, *words: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-P", "-m", "embedded", *words]
    environment = dict(os.environ) | to_environment(settings) | {"PYTHONPATH": str(SOURCE_ROOT)}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(argv, env=environment, text=True, **pipes)


def end_of(process: subprocess.Popen[str]) -> tuple[int | None, str]:
    """Its status and all that it said; None where it went on."""
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        return None, said
    return process.returncode, said


def queue_of(customer: Customer, job_id: str) -> str:
    with customer.served.database.reading() as session:
        return jobs.get_job(session, customer.project.id, job_id).queue


@pytest.mark.parametrize("case", CASES)
def test_a_process_that_disagrees_with_its_deployment_does_not_start(
    first: Customer, tmp_path: Path, case: str
) -> None:
    """Invariant (iii): it ends with a status and a sentence that says what to do; the first replica goes on."""
    wrong, served = CASES[case], first.served
    before = first.create().json()["id"]
    settings = served.settings.model_copy(update={"port": 0})
    settings = Settings.model_validate(settings.model_dump() | wrong.changes(tmp_path))
    with at_revision(served, wrong.revision):
        started = {name: begin(settings, *VERBS[name]) for name in wrong.refuse}
        ends = {name: end_of(process) for name, process in started.items()}
    for name, (status, said) in ends.items():
        assert status not in (0, None), f"{name}: {said[-2000:]}"
        assert wrong.says in said, f"{name}: {said[-2000:]}"
    assert first.http.get(f"/fine_tuning/jobs/{before}").json()["status"] == "validating_files"
    assert first.create().status_code == 200


def test_of_two_replicas_with_different_queues_the_newest_decides(first: Customer) -> None:
    """No job of either may wait in a queue that nobody serves: those that wait are sent to the new one, too."""
    before = first.job()
    assert before.queue == "train.cpu"
    settings = first.served.settings.model_copy(update={"port": 0, "train_queue": "train.gpu24"})
    second = begin(settings, *VERBS["API"])
    try:
        wait_until(lambda: queue_of(first, before.id) == "train.gpu24", seconds=SECONDS)
        later = first.job()  # of the replica that is set to the old one
        wait_until(lambda: queue_of(first, later.id) == "train.gpu24", seconds=SECONDS)
    finally:
        second.terminate()
        second.communicate(timeout=SECONDS)

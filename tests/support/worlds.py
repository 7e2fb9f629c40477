"""What a worker finds when it starts: a migrated database, a ready base, and queued jobs with known recipes."""

import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select

from app.core import deployment
from app.core.broker import Wake
from app.core.ids import Prefix, new_id
from app.core.jobs.lease import enrol_worker
from app.core.projects import ensure_project
from app.core.settings import LeaseSettings, LimitSettings, Settings
from app.core.storage.blobs import BlobStore, open_blobs, read_bytes
from app.core.storage.database import Database, migrate, open_database
from app.core.storage.job_states import JobState
from app.core.storage.tables import (
    Artifact,
    BaseRow,
    BaseStatus,
    Checkpoint,
    Event,
    File,
    Form,
    Job,
)
from finetuning.contract.recipe import JobKind, OptimiserSettings, Recipe
from tests.support.backends import BACKEND
from tests.support.jobs import add_file, add_job
from worker.attempt.launch import Launch, Launcher, Mode, launch_command
from worker.attempt.supervisor import Host

ROWS = b'{"messages": []}\n'
CHILD_PROGRAM = Path(__file__).with_name("programs") / "child.py"
BASE_ID = "tiny"
# beats and waits are quick; a lease outlasts the stalls of a busy test machine
FAST = LeaseSettings(
    beat_seconds=0.1,
    ttl_seconds=40.0,
    self_stop_seconds=20.0,
    kill_seconds=25.0,
    reaper_tick_seconds=0.2,
    rewake_seconds=0.5,
    backoff_seconds=0.0,
)
# for tests in which a lease must run out, or nearly so
SHORT = FAST.model_copy(update={"ttl_seconds": 12.0, "self_stop_seconds": 5.0, "kill_seconds": 7.0})


def settings_in(folder: Path, **changes: object) -> Settings:
    """Settings of a service of its own below `folder`, on the backend of this run."""
    values: dict[str, object] = {
        "data": folder,
        "base": BASE_ID,
        "lease": FAST,
        "database_seconds": 1.0,
        "limits": LimitSettings(free_bytes=0),
    }
    runtime = changes.get("runtime")
    broker = BACKEND.broker(runtime) if isinstance(runtime, Path) else {}
    return Settings.model_validate(values | BACKEND.storage(folder) | broker | changes)


def scripted(**script: object) -> Launcher:
    """A launcher of the stand-in training process with this script."""

    def launch(scratch: Path, mode: Mode) -> Launch:
        flags = ("--parity",) if mode == "parity" else ()
        argv = (sys.executable, "-P", str(CHILD_PROGRAM), str(scratch), json.dumps(script), *flags)
        return Launch(argv, launch_command(scratch, mode).env, scratch)

    return launch


def recipe(*, steps: int = 30, save_every: int = 10, kind: JobKind = JobKind.FINETUNE, **changes: object) -> Recipe:
    """A complete recipe for the stand-in."""
    values = {
        "name": "stand-in",
        "kind": kind,
        "base": BASE_ID,
        "steps": steps,
        "save_every": save_every,
        "optimiser": OptimiserSettings(learning_rate=1e-3),
    }
    return Recipe.model_validate(values | changes)


@dataclass(frozen=True)
class Scene:
    """An open service without processes: rows go in directly, supervisors are called in this process."""

    settings: Settings
    database: Database
    blobs: BlobStore
    worker_id: str
    wakes: list[Wake] = field(default_factory=list)

    def host(self, launcher: Launcher) -> Host:
        """A worker process's context with this launcher."""
        return Host(self.settings, self.database, self.blobs, self.worker_id, self.wakes.extend, launcher)

    def add_job(self, wanted: Recipe, rows: bytes = ROWS) -> str:
        """A queued job over these rows; returns its id. An align job is added as the operator's, without rows."""
        with self.database.writing() as session:
            project = ensure_project(session, "default", policy="immunotune")
            session.commit()
        if wanted.kind is JobKind.FINETUNE:
            file = add_file(self.database, project, self.settings, data=rows, blobs=self.blobs)
            return add_job(self.database, project, self.settings, recipe=wanted, training_file=file.id).id
        with self.database.writing() as session:
            job = Job(
                id=new_id(Prefix.JOB),
                project_id=project.id,
                kind=wanted.kind,
                base_id=wanted.base,
                policy=project.policy,
                request={},
                recipe=wanted.model_dump(mode="json"),
                queue=self.settings.train_queue,
                state=JobState.QUEUED,
            )
            session.add(job)
            session.commit()
            return job.id

    def job(self, job_id: str) -> Job:
        """The job as it stands now."""
        with self.database.reading() as session:
            return session.scalars(select(Job).where(Job.id == job_id)).one()

    def messages(self, job_id: str) -> list[str]:
        """The job's events, oldest first."""
        with self.database.reading() as session:
            return list(session.scalars(select(Event.message).where(Event.job_id == job_id).order_by(Event.seq)))

    def checkpoints(self, job_id: str) -> list[tuple[int, int]]:
        """(step, fence) of each checkpoint, oldest first."""
        with self.database.reading() as session:
            found = session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.seq))
            return [(row.step, row.fence) for row in found]

    def artifacts(self, job_id: str) -> dict[Form, Artifact]:
        """The job's results by form, in the order in which they were added."""
        with self.database.reading() as session:
            found = session.scalars(select(Artifact).where(Artifact.job_id == job_id).order_by(Artifact.seq))
            return {Form(row.form): row for row in found}

    def download(self, artifact: Artifact) -> bytes:
        """The bytes behind an artifact."""
        with self.database.reading() as session:
            key = session.scalars(select(File.blob_key).where(File.id == artifact.file_id)).one()
        return read_bytes(self.blobs, key)

    def unpacked(self, artifact: Artifact, folder: Path) -> dict[str, bytes]:
        """The files in a zipped artifact."""
        packed = folder / f"{artifact.id}.zip"
        packed.write_bytes(self.download(artifact))
        with zipfile.ZipFile(packed) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


def open_scene(settings: Settings, *, base_status: BaseStatus = BaseStatus.READY) -> Scene:
    """Migrate and open a service with the base `tiny` and one enrolled worker."""
    migrate(settings)
    database, blobs = open_database(settings), open_blobs(settings)
    deployment.bind(database, blobs, settings)
    with database.writing() as session:
        session.add(BaseRow(id=BASE_ID, source=BASE_ID, status=base_status, context=512))
        worker_id = enrol_worker(session, host="test", devices="none")
        session.commit()
    return Scene(settings, database, blobs, worker_id)


def pid_in(path: Path) -> Callable[[], int]:
    """Reads the pid that a stand-in wrote to `path`; 0 before it has."""
    return lambda: int(path.read_text() or 0) if path.exists() else 0

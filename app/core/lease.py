"""The right of one attempt to work on one job: claim, beat, release, fail, finish; and workers' drain marks.

Knows the fence: every write of an attempt is one conditional UPDATE on (id, fence, running) first, results after,
all in one transaction. Only the database clock stamps or compares a lease. Must not know processes or blobs.
"""

from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy.orm import Session

from app.core.blobs import Blob
from app.core.broker import Wake
from app.core.db import JsonObject
from app.core.jobs import JobError, NewEvent
from app.core.settings import LeaseSettings, Settings
from app.core.tables import Form
from finetuning.spec.progress import Stage
from finetuning.spec.recipe import Recipe


@dataclass(frozen=True)
class SavedCheckpoint:
    """Where a complete checkpoint of the first `step` steps lies: a blob prefix without final slash."""

    step: int
    prefix: str
    fingerprint: str
    metrics: JsonObject


@dataclass(frozen=True)
class Lease:
    """One attempt's right, and all that it needs to begin. Files are blobs: key, size, sha256."""

    job_id: str
    project_id: str
    fence: int
    recipe: Recipe
    base_id: str
    base_source: str
    training: Blob | None
    validation: Blob | None
    alignment: Blob | None
    checkpoint: SavedCheckpoint | None

    @property
    def prefix(self) -> str:
        """Where this attempt's blobs go: jobs/<job>/<fence>."""
        return f"jobs/{self.job_id}/{self.fence}"


@dataclass(frozen=True)
class News:
    """What happened since the last beat."""

    events: tuple[NewEvent, ...] = ()
    checkpoints: tuple[SavedCheckpoint, ...] = ()
    stage: Stage | None = None
    progress: JsonObject | None = None


@dataclass(frozen=True)
class Beat:
    """The answer to a beat; `draining` asks the supervisor to save and release."""

    draining: bool


@dataclass(frozen=True)
class PublishedFile:
    """An uploaded result: its form, the name that downloads show, and its bytes."""

    form: Form
    filename: str
    blob: Blob


@dataclass(frozen=True)
class Published:
    """All that an attempt leaves. `summary` is stored as jobs.result and must be small:

    {"safety": SafetyReport JSON, "rows": {rows_total, rows_kept, rows_downweighted, rows_excluded}, "parity": ... }.
    `prefix` is the blob prefix of the result (reports/*.json lie under it as single blobs too).
    """

    prefix: str
    files: tuple[PublishedFile, ...]
    summary: JsonObject
    trained_tokens: int


class ReleaseCause(StrEnum):
    """Why an attempt hands its job back: drained after saving, lost its child, or found no room."""

    DRAIN = "drain"
    FAULT = "fault"
    STORAGE = "storage"


def claim(session: Session, settings: Settings, job_id: str, worker_id: str) -> Lease | None:
    """Take a queued, due job: fence + 1 and a fresh lease. None: somebody has it, it is final, its project runs
    as many as it may, or its base is not ready."""
    raise NotImplementedError


def beat(session: Session, timings: LeaseSettings, lease: Lease, worker_id: str, news: News) -> Beat:
    """Renew the lease and store the news; a new checkpoint sets losses to 0. Raises LeaseLost."""
    raise NotImplementedError


def release(
    session: Session, timings: LeaseSettings, lease: Lease, cause: ReleaseCause, *, message: str
) -> tuple[Wake, ...]:
    """Hand the job back: DRAIN is due at once, FAULT counts a loss and rests (or fails the job `worker_crashed` at
    the last allowed loss), STORAGE rests without counting. Raises LeaseLost. Returns wake-ups for after the commit."""
    raise NotImplementedError


def fail(
    session: Session, lease: Lease, error: JobError, *, published: Published | None = None, quarantine: bool = False
) -> tuple[Wake, ...]:
    """End the job `failed`. Published results stay readable; with `quarantine` weight forms are held back.

    Raises LeaseLost. Returns the project's next wake-up.
    """
    raise NotImplementedError


def finish(session: Session, lease: Lease, published: Published) -> tuple[Wake, ...]:
    """End the job `succeeded`: files, artifacts and the model row (for align jobs: the base is ready), at once.

    Raises LeaseLost, ValueError when a form is missing. Returns wake-ups: the project's next job, or after an
    alignment every fine-tune that waited for the base.
    """
    raise NotImplementedError


def enrol_worker(session: Session, *, host: str, devices: str) -> str:
    """Note a worker that starts to take jobs; returns its id."""
    raise NotImplementedError


def drain_worker(session: Session, worker_id: str) -> None:
    """Ask this worker's supervisor to save and release at its next beat."""
    raise NotImplementedError

"""Job rows outside an attempt: add, checks, reads, cancel.

Knows the moves that the front desk and the checks pool make; the moves of an attempt are in lease.py.
Every move is one conditional UPDATE and one event in the same transaction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.core.broker import Wake
from app.core.db import JsonObject, Listing, Page
from app.core.policy import CreateJob
from app.core.settings import Settings
from app.core.tables import Artifact, Checkpoint, Event, File, Form, Job, Project
from finetuning.spec.recipe import Recipe


@dataclass(frozen=True)
class JobError:
    """The wire's `error` of a failed job."""

    code: str
    message: str
    param: str | None = None
    details: JsonObject | None = None


@dataclass(frozen=True)
class NewEvent:
    """An event to append; `data` goes with type `metrics`."""

    message: str
    level: str = "info"
    type: str = "message"
    data: JsonObject | None = None


@dataclass(frozen=True)
class JobResult:
    """An artifact with its File, as results.py and downloads need it."""

    artifact: Artifact
    file: File


def add_job(session: Session, settings: Settings, project: Project, request: CreateJob) -> Job:
    """Add a job (`validating_files`) with its resolved recipe and first event; after the commit wake with `wake_for`.

    Raises InvalidRequest (`model_not_found`, `model_not_fine_tunable`, `invalid_suffix`, `invalid_training_file`,
    `invalid_validation_file`, `invalid_n_examples`, `safety_policy_violation`), QuotaExceeded `too_many_jobs`.
    """
    raise NotImplementedError


def wake_for(job: Job) -> Wake:
    """The wake-up that gets this job on: its check while validating, its run afterwards."""
    raise NotImplementedError


def get_job(session: Session, project_id: str, job_id: str) -> Job:
    """One job of this project. Raises NotFound."""
    raise NotImplementedError


def find_unchecked(session: Session, job_id: str) -> Job | None:
    """The job if it still waits for its check (for the checks pool, which serves every project)."""
    raise NotImplementedError


def list_jobs(
    session: Session, project_id: str, page: Page, *, metadata: Mapping[str, str] | None = None, no_metadata: bool = False
) -> Listing[Job]:
    """Jobs of this project, those with all of these metadata pairs, or those without any. Raises `invalid_cursor`."""
    raise NotImplementedError


def list_events(session: Session, project_id: str, job_id: str, page: Page) -> Listing[Event]:
    """The job's story. Raises NotFound, `invalid_cursor`."""
    raise NotImplementedError


def list_checkpoints(session: Session, project_id: str, job_id: str, page: Page) -> Listing[Checkpoint]:
    """The job's checkpoints. Raises NotFound, `invalid_cursor`."""
    raise NotImplementedError


def list_artifacts(session: Session, project_id: str, job_id: str) -> Sequence[JobResult]:
    """All results of a job, the results CSV first, quarantined ones included. Raises NotFound."""
    raise NotImplementedError


def get_artifact(session: Session, project_id: str, job_id: str, form: Form) -> JobResult:
    """One downloadable result. Raises NotFound, Forbidden `artifact_quarantined`, `artifact_form_unavailable`."""
    raise NotImplementedError


def cancel(session: Session, project_id: str, job_id: str) -> Job:
    """Cancel at once (state and fence + 1 in one update); a cancelled job stays as it is.

    Raises NotFound, InvalidRequest `invalid_job_state` on a succeeded or failed job.
    """
    raise NotImplementedError


def pass_checks(session: Session, job_id: str, recipe: Recipe) -> tuple[Wake, ...]:
    """validating_files -> queued with the recipe for the counted rows; no-op when the job has moved on.

    Returns the wake-up to send after the commit: none while the job's base is still being aligned.
    """
    raise NotImplementedError


def fail_checks(session: Session, job_id: str, error: JobError) -> bool:
    """validating_files -> failed; False when the job has moved on."""
    raise NotImplementedError


def append_events(session: Session, job_id: str, events: Sequence[NewEvent]) -> None:
    """Append to the job's story, in this order."""
    raise NotImplementedError

"""Job rows outside an attempt: add, check, read, cancel.

Every move is one conditional UPDATE and one event in the same transaction. The moves of an attempt are in lease.py and
ended.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from app.core.broker import CHECK_JOB, CHECKS_QUEUE, RUN_JOB, Wake
from app.core.errors import Forbidden, InvalidRequest, NotFound, QuotaExceeded, model_not_found, not_found
from app.core.files import get_file, lock_file
from app.core.ids import Prefix, new_id
from app.core.jobs.policy import CreateJob, get_policy, require_alignment, resolve_recipe
from app.core.settings import Settings
from app.core.storage.database import JsonObject, Listing, Page, change, db_now, fetch_page, json_text
from app.core.storage.job_states import FINAL, JobState, sources_of
from app.core.storage.tables import (
    Artifact,
    BaseRow,
    BaseStatus,
    Checkpoint,
    Event,
    File,
    FilePurpose,
    FileStatus,
    Form,
    Job,
    Project,
)
from app.core.telemetry import JOBS_ENDED
from finetuning.contract.recipe import RECIPE_VERSION, JobKind, Recipe
from finetuning.recipes.registry import ALIGNMENTS

_SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class JobError:
    """The `error` of a failed job, as the API shows it."""

    code: str
    message: str
    param: str | None = None
    details: JsonObject | None = None


@dataclass(frozen=True)
class NewEvent:
    """An event to append; `data` goes with type `metrics`.

    Its `id` is given here, so that one whose commit is in doubt is written once however often it is sent.
    """

    message: str
    level: str = "info"
    type: str = "message"
    data: JsonObject | None = None
    id: str = field(default_factory=lambda: new_id(Prefix.EVENT), compare=False)


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
    _leave_room(session, project, settings.limits.live_jobs)
    base = _base_to_tune(session, request.model)
    _check_suffix(request.suffix)
    training = _readable_file(session, project, request.training_file, "training_file")
    if request.validation_file is not None:
        _readable_file(session, project, request.validation_file, "validation_file")
    policy = get_policy(project.policy, queue=settings.train_queue, release=settings.release)
    require_alignment(policy, base.id, served_alignment(session, base))
    rows = cast(int, (training.validation or {})["rows"])
    if rows < settings.limits.rows_min:
        raise InvalidRequest(
            f"Training file has {rows} examples, but must have at least {settings.limits.rows_min}.",
            code="invalid_n_examples",
            param="training_file",
        )
    job = Job(
        id=new_id(Prefix.JOB),
        project_id=project.id,
        kind=JobKind.FINETUNE,
        base_id=base.id,
        policy=policy.name,
        request=request.model_dump(mode="json"),
        **recipe_columns(resolve_recipe(policy, base.id, request, rows=rows)),
        queue=policy.queue,
        training_file=request.training_file,
        validation_file=request.validation_file,
        suffix=request.suffix,
        metadata_=request.metadata,
    )
    session.add(job)
    session.flush()
    append_events(session, job.id, [NewEvent(f"Created fine-tuning job: {job.id}")])
    return job


def wake_for(job: Job) -> Wake:
    """The wake-up that gets this job on: its check while validating, its run afterwards."""
    if job.state == JobState.VALIDATING:
        return Wake(CHECK_JOB, job.id, CHECKS_QUEUE)
    return Wake(RUN_JOB, job.id, job.queue)


def get_job(session: Session, project_id: str, job_id: str) -> Job:
    """One job of this project. Raises NotFound."""
    job = session.scalars(select(Job).where(Job.id == job_id, Job.project_id == project_id)).one_or_none()
    if job is None:
        raise not_found("fine-tuning job", job_id)
    return job


def find_unchecked(session: Session, job_id: str) -> Job | None:
    """The job if it still waits for its check (for the checks pool, which serves every project), and this release
    knows the form of its recipe: a check writes the recipe anew."""
    waiting = Job.id == job_id, Job.state == JobState.VALIDATING, recipe_is_known()
    return session.scalars(select(Job).where(*waiting)).one_or_none()


def recipe_columns(recipe: Recipe) -> JsonObject:
    """What a job's row says of its recipe."""
    return {"recipe": recipe.model_dump(mode="json"), "recipe_version": recipe.schema_version}


def recipe_is_known() -> ColumnElement[bool]:
    """Whether the job's recipe has a form that this release can work on; a newer one is left to newer workers."""
    return Job.recipe_version <= RECIPE_VERSION


def keep_unchecked(session: Session, job_id: str) -> bool:
    """Say that a worker is at the job's check, so that nobody else is woken for it; False when it has moved on."""
    still = Job.id == job_id, Job.state == JobState.VALIDATING
    return change(session, update(Job).where(*still).values(woken_at=db_now())) == 1


def model_name(base_id: str, org_slug: str, suffix: str | None, job_id: str) -> str:
    """The name by which clients call the model that a job makes; an empty suffix keeps its colons."""
    return f"ft:{base_id}:{org_slug}:{suffix or ''}:{job_id[-8:]}"


def list_jobs(
    session: Session,
    project_id: str,
    page: Page,
    *,
    metadata: Mapping[str, str] | None = None,
    no_metadata: bool = False,
) -> Listing[Job]:
    """Jobs of this project, those with all of these metadata pairs, or those without any. Raises `invalid_cursor`."""
    shown = [json_text(Job.metadata_, key) == value for key, value in (metadata or {}).items()]
    if no_metadata:
        shown.append(Job.metadata_.is_(None))
    return fetch_page(session, select(Job).where(Job.project_id == project_id), Job, page, *shown)


def list_events(session: Session, project_id: str, job_id: str, page: Page) -> Listing[Event]:
    """The job's story. Raises NotFound, `invalid_cursor`."""
    get_job(session, project_id, job_id)
    return fetch_page(session, select(Event).where(Event.job_id == job_id), Event, page)


def list_checkpoints(session: Session, project_id: str, job_id: str, page: Page) -> Listing[Checkpoint]:
    """The job's checkpoints. Raises NotFound, `invalid_cursor`."""
    get_job(session, project_id, job_id)
    return fetch_page(session, select(Checkpoint).where(Checkpoint.job_id == job_id), Checkpoint, page)


def list_artifacts(session: Session, project_id: str, job_id: str) -> Sequence[JobResult]:
    """All results of a job that still exist, the results CSV first, quarantined ones included. Raises NotFound."""
    get_job(session, project_id, job_id)
    found = session.execute(
        select(Artifact, File)
        .join(File, File.id == Artifact.file_id)
        .where(Artifact.job_id == job_id, File.deleted_at.is_(None))
        .order_by(Artifact.form != Form.METRICS, Artifact.seq)
    )
    return [JobResult(artifact, file) for artifact, file in found]


def get_artifact(session: Session, project_id: str, job_id: str, form: Form) -> JobResult:
    """One downloadable result. Raises NotFound, Forbidden `artifact_quarantined`, `artifact_form_unavailable`."""
    for result in list_artifacts(session, project_id, job_id):
        if result.artifact.form == form:
            check_released(result.artifact)
            return result
    raise InvalidRequest(
        f"This job has no artifact of form '{form}'. GET its /artifacts for the forms it has.",
        code="artifact_form_unavailable",
        param="form",
    )


def find_artifact_of(session: Session, file: File) -> Artifact | None:
    """The artifact that this result file is, so that file downloads can ask `check_released`."""
    return session.scalars(select(Artifact).where(Artifact.file_id == file.id)).one_or_none()


def check_released(artifact: Artifact) -> None:
    """Raises Forbidden `artifact_quarantined` for weights that the gate holds back."""
    if artifact.quarantined:
        raise Forbidden(
            "The safety gate held these weights back. GET the job's /safety for the figures; reports can be read.",
            code="artifact_quarantined",
        )


def cancel(session: Session, project_id: str, job_id: str) -> Job:
    """Cancel at once (state and fence + 1 in one update); a cancelled job stays as it is.

    Raises NotFound, InvalidRequest `invalid_job_state` on a succeeded or failed job.
    """
    ended = {"fence": Job.fence + 1, "lease_until": None, "finished_at": db_now()}
    event = NewEvent("Fine-tuning job cancelled")
    job = move(session, job_id, JobState.CANCELLED, Job.project_id == project_id, event=event, **ended)
    if job is None:
        job = get_job(session, project_id, job_id)
        if job.state != JobState.CANCELLED:
            raise InvalidRequest(f"The job has already {job.state}; it cannot be cancelled.", code="invalid_job_state")
    return job


def pass_checks(session: Session, job_id: str, recipe: Recipe) -> tuple[Wake, ...]:
    """validating_files -> queued with the recipe for the counted rows; no-op when the job has moved on.

    Returns the wake-up to send after the commit: none while the job's base is still being aligned.
    """
    ready = {**recipe_columns(recipe), "stage": "wait", "woken_at": db_now()}
    event = NewEvent("Files validated, moving job to queued state")
    unchecked = Job.state == JobState.VALIDATING, recipe_is_known()
    job = move(session, job_id, JobState.QUEUED, *unchecked, event=event, **ready)
    if job is None:
        return ()
    base = session.scalars(select(BaseRow).where(BaseRow.id == job.base_id)).one()
    if base.status != BaseStatus.READY:
        append_events(session, job_id, [_waits_for(base)])
        return ()
    return (wake_for(job),)


def fail_checks(session: Session, job_id: str, error: JobError) -> bool:
    """validating_files -> failed; False when the job has moved on."""
    ended = {"error": asdict(error), "finished_at": db_now()}
    event = NewEvent(error.message, level="error")
    job = move(session, job_id, JobState.FAILED, Job.state == JobState.VALIDATING, event=event, **ended)
    return job is not None


def append_events(session: Session, job_id: str, events: Sequence[NewEvent]) -> None:
    """Append to the job's story, in this order."""
    session.add_all(Event(job_id=job_id, **asdict(event)) for event in events)
    session.flush()


def move(
    session: Session,
    job_id: str,
    target: JobState,
    *conditions: ColumnElement[bool],
    event: NewEvent | None,
    **values: object,
) -> Job | None:
    """The one way a job changes state: a conditional UPDATE along a legal move, and its event, if it is worth one.

    None when no row was in a state (and under the conditions) from which it may move: somebody else was faster.
    """
    statement = (
        update(Job)
        .where(Job.id == job_id, Job.state.in_(sources_of(target)), *conditions)
        .values(state=target, **values)
        .returning(Job)
    )
    job = session.scalars(statement, execution_options={"populate_existing": True}).one_or_none()
    if job is None:
        return None
    if event is not None:
        append_events(session, job_id, [event])
    if target in FINAL:
        JOBS_ENDED.labels(state=target).inc()
        if job.kind == JobKind.ALIGN and target != JobState.SUCCEEDED:
            left = BaseRow.id == job.base_id, BaseRow.status == BaseStatus.ALIGNING
            failed = update(BaseRow).where(*left).values(status=BaseStatus.FAILED).returning(BaseRow)
            for base in session.scalars(failed, execution_options={"populate_existing": True}).all():
                tell_waiting(session, base)
    return job


def tell_waiting(session: Session, base: BaseRow) -> int:
    """Tell the jobs that wait for a base why it does not come now; they wait on. Returns how many there are."""
    waiting = Job.kind == JobKind.FINETUNE, Job.state.in_((JobState.VALIDATING, JobState.QUEUED))
    ids = session.scalars(select(Job.id).where(*waiting, Job.base_id == base.id)).all()
    for job_id in ids:
        append_events(session, job_id, [_waits_for(base)])
    return len(ids)


def served_alignment(session: Session, base: BaseRow) -> str:
    """By which alignment of the registry this base is aligned, or is being aligned."""
    recipe = session.scalars(select(Job.recipe).where(Job.id == base.alignment_job)).one_or_none() or {}
    name = str(recipe.get("name"))
    return name if name in ALIGNMENTS else "vaccine"  # the only one that earlier releases served


def base_trouble(base: BaseRow) -> str | None:
    """Why nothing can be asked of this base, and what to do; None while it is ready or being aligned."""
    if base.status == BaseStatus.FAILED:
        return (
            f"The alignment of the base '{base.id}' failed, so it cannot be used. GET /v1/models/{base.id} for the "
            "error; the operator's next start of the service tries it again."
        )
    if base.status == BaseStatus.RETIRED:
        return f"The base '{base.id}' is no longer served here. GET /v1/models lists the one that is, as its first."
    return None


def _waits_for(base: BaseRow) -> NewEvent:
    trouble = base_trouble(base)
    if trouble is None:
        return NewEvent(f"Waiting until the base {base.id} is aligned")
    return NewEvent(f"The job waits for its base. {trouble}", level="warn", data={"code": "base_not_served"})


def _leave_room(session: Session, project: Project, live_jobs: int) -> None:
    # the project row is the lock under which its jobs are counted, here and in lease.claim; foreign keys pass it
    session.execute(select(Project.seq).where(Project.id == project.id).with_for_update(key_share=True))
    waiting = Job.project_id == project.id, Job.state.in_((JobState.VALIDATING, JobState.QUEUED))
    if session.scalars(select(func.count()).select_from(Job).where(*waiting)).one() >= live_jobs:
        raise QuotaExceeded(
            f"{live_jobs} jobs already wait in this project. Cancel one or wait until some have run.",
            code="too_many_jobs",
        )


def _base_to_tune(session: Session, model: str) -> BaseRow:
    base = session.scalars(select(BaseRow).where(BaseRow.id == model)).one_or_none()
    if base is not None:
        trouble = base_trouble(base)
        if trouble is not None:
            raise InvalidRequest(trouble, code="model_not_fine_tunable", param="model")
        return base
    if model.startswith("ft:"):
        raise InvalidRequest(
            "Training on top of a fine-tuned model is not possible here. Name a base; GET /v1/models lists them.",
            code="model_not_fine_tunable",
            param="model",
        )
    raise InvalidRequest(model_not_found(model).message, code="model_not_found", param="model")


def _check_suffix(suffix: str | None) -> None:
    if suffix is not None and (not _SUFFIX.fullmatch(suffix) or suffix.startswith("ckpt-step-")):
        raise InvalidRequest(
            "The suffix must be 1 to 64 letters, digits, '_', '.' or '-', begin with a letter or digit, "
            "and not begin with 'ckpt-step-'.",
            code="invalid_suffix",
            param="suffix",
        )


def _readable_file(session: Session, project: Project, file_id: str, param: str) -> File:
    code = f"invalid_{param}"
    lock_file(session, project.id, file_id)
    try:
        file = get_file(session, project.id, file_id)
    except NotFound as error:
        raise InvalidRequest(error.message, code=code, param=param) from error
    if file.purpose != FilePurpose.FINE_TUNE:
        raise InvalidRequest("Name a file of purpose 'fine-tune'; this one is a job's result.", code=code, param=param)
    if file.status != FileStatus.PROCESSED:
        found = file.validation or {}
        details = {key: found.get(key) for key in ("errors_total", "truncated", "errors")}
        reason = file.status_details or "it is not valid"
        raise InvalidRequest(f"The file cannot be used: {reason}", code=code, param=param, details=details)
    if (file.validation or {}).get("format") == "dpo":
        raise InvalidRequest(
            "This is a preference file, and supervised training reads chat rows. Upload chat rows.",
            code="format_method_mismatch",
            param=param,
        )
    return file

"""Every row class, once. Rows are the domain objects: there is no second layer of entities.

Times are unix seconds by the database's clock (`database.db_now`).
"""

from enum import StrEnum

from sqlalchemy import ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.core.storage.database import JsonObject, TableRow, db_now
from app.core.storage.job_states import JobState
from finetuning.contract.recipe import JobKind


class Deployment(TableRow):
    """The one row that says whose database this is; its `id` lies in the blob store too (`storage/identity.py`).

    `pepper` is the fingerprint of what hashes API keys, `queue` the one that jobs are sent to. While `audit_due`
    nothing is swept. `swept_at` elects the process whose turn the sweep is; `sweeps` counts them, here and in the
    store, which tells a database that was set back.
    """

    __tablename__ = "deployments"
    pepper: Mapped[str | None]
    queue: Mapped[str | None]
    bound_at: Mapped[float | None]  # when the store was seen to carry the id
    audit_due: Mapped[bool] = mapped_column(default=False)
    swept_at: Mapped[float | None]
    sweeps: Mapped[int] = mapped_column(default=0)


class SweepMark(TableRow):
    """A blob that no row needed when a sweep looked; the next one deletes it. `id` is the sha256 of its key."""

    __tablename__ = "sweep_marks"
    seen_at: Mapped[float] = mapped_column(default=db_now())


class Org(TableRow):
    """A group of projects; `slug` is its word in model names."""

    __tablename__ = "orgs"
    name: Mapped[str]
    slug: Mapped[str] = mapped_column(unique=True)


class Project(TableRow):
    """A tenant. `policy` names the defence that its jobs get (`jobs.policy.get_policy`)."""

    __tablename__ = "projects"
    org_id: Mapped[str] = mapped_column(ForeignKey("orgs.id"))
    name: Mapped[str] = mapped_column(unique=True)
    policy: Mapped[str]


class ApiKey(TableRow):
    """A key's keyed hash, the hint that people see, and what it may do."""

    __tablename__ = "api_keys"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    hash: Mapped[str] = mapped_column(unique=True)
    hint: Mapped[str]
    scopes: Mapped[list[str]]
    revoked_at: Mapped[float | None]


class FilePurpose(StrEnum):
    """Who made the file: the client, or a job."""

    FINE_TUNE = "fine-tune"
    RESULTS = "fine-tune-results"


class FileStatus(StrEnum):
    """The `status` of a file, as the API shows it; known once its last byte is scanned."""

    PROCESSED = "processed"
    ERROR = "error"


class File(TableRow):
    """Immutable bytes with their sha256. `deleted_at` hides the row; it stays so that cursors keep their meaning.

    `validation` holds what a check found, cut to what a reply shows; `report` all of it as JSON text, up to megabytes,
    and is read by name only.
    """

    __tablename__ = "files"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    filename: Mapped[str] = mapped_column(String(255))
    purpose: Mapped[str]
    status: Mapped[str]
    status_details: Mapped[str | None] = mapped_column(String(512))
    blob_key: Mapped[str] = mapped_column(String(512))
    sha256: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int]
    validation: Mapped[JsonObject | None]
    report: Mapped[str | None] = mapped_column(Text(), deferred=True)
    expires_at: Mapped[float | None]
    woken_at: Mapped[float | None] = mapped_column(default=db_now())  # no longer read
    deleted_at: Mapped[float | None]
    erased_at: Mapped[float | None]
    erase_after: Mapped[float | None]  # after a failed try, not before this
    erase_failures: Mapped[int | None]

    @classmethod
    def keys(cls) -> tuple[Index | UniqueConstraint, ...]:
        return (
            Index(None, "project_id", "created_at", "seq"),
            Index(None, "status", "created_at"),
            Index(None, "expires_at"),
            Index(None, "erased_at", "deleted_at"),
            Index(None, "blob_key"),
        )


class Job(TableRow):
    """A request to train, its recipe, and the lease of the attempt that works on it.

    `request` is what the client asked (jobs.policy.CreateJob, "auto" included), `recipe` what it resolved to,
    `recipe_version` the form of that: only a worker that knows the form takes the job.
    `progress` holds step, total_steps and the like for people; `result` the published summary.
    """

    __tablename__ = "jobs"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    kind: Mapped[str] = mapped_column(default=JobKind.FINETUNE)
    base_id: Mapped[str] = mapped_column(String(160))
    policy: Mapped[str]
    request: Mapped[JsonObject]
    recipe: Mapped[JsonObject]
    recipe_version: Mapped[int] = mapped_column(default=1, server_default="1")
    queue: Mapped[str]
    training_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    validation_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    suffix: Mapped[str | None]
    metadata_: Mapped[dict[str, str] | None] = mapped_column("metadata")
    state: Mapped[str] = mapped_column(default=JobState.VALIDATING)
    stage: Mapped[str] = mapped_column(default="validate")
    progress: Mapped[JsonObject] = mapped_column(default=dict)
    fence: Mapped[int] = mapped_column(default=0)
    lease_until: Mapped[float | None]
    worker_id: Mapped[str | None]
    losses: Mapped[int] = mapped_column(default=0)
    # since the last checkpoint: hosts that were lost with it, and returns that nobody is charged with
    host_losses: Mapped[int] = mapped_column(default=0, server_default="0")
    rests: Mapped[int] = mapped_column(default=0, server_default="0")
    # which attempt holds the fence: a restored backup gives a number out again, and nobody else has this word
    attempt: Mapped[str | None]
    avoid_worker: Mapped[str | None]
    avoid_until: Mapped[float | None]
    progress_at: Mapped[float | None]
    run_after: Mapped[float] = mapped_column(default=db_now())
    woken_at: Mapped[float | None] = mapped_column(default=db_now())
    started_at: Mapped[float | None]
    saved_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    trained_tokens: Mapped[int | None]
    fine_tuned_model: Mapped[str | None]
    error: Mapped[JsonObject | None]
    result: Mapped[JsonObject | None]

    @classmethod
    def keys(cls) -> tuple[Index | UniqueConstraint, ...]:
        return (
            Index(None, "project_id", "created_at", "seq"),
            Index(None, "state", "run_after"),
            Index(None, "state", "lease_until"),
            Index(None, "state", "saved_at"),
            Index(None, "state", "created_at"),
            Index(None, "state", "finished_at"),
            Index(None, "training_file"),
            Index(None, "validation_file"),
        )


class Event(TableRow):
    """One line of a job's story. Never row text, prompts or keys."""

    __tablename__ = "events"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[JsonObject | None]

    @classmethod
    def keys(cls) -> tuple[Index | UniqueConstraint, ...]:
        return (Index(None, "job_id", "created_at", "seq"),)


class Checkpoint(TableRow):
    """A complete checkpoint under `prefix` in the blob store: a live job's exists if and only if this row does.

    Once the job has ended nobody resumes from it: its bytes go, the row stays for its metrics.
    """

    __tablename__ = "checkpoints"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    step: Mapped[int]
    fence: Mapped[int]
    prefix: Mapped[str] = mapped_column(String(512))
    metrics: Mapped[JsonObject]
    fingerprint: Mapped[str]
    # what its list of contents must hash to (earlier releases did not say), and when it was found to be rotten
    contents_sha256: Mapped[str | None] = mapped_column(String(64))
    unusable_at: Mapped[float | None]

    @classmethod
    def keys(cls) -> tuple[Index | UniqueConstraint, ...]:
        return (UniqueConstraint("job_id", "step", "fence"),)


class Form(StrEnum):
    """What an artifact is. `alignment` belongs to align jobs; `metrics` is the results CSV."""

    METRICS = "metrics"
    REPORTS = "reports"
    MASK = "mask"
    ADAPTER = "adapter"
    ADAPTER_STOCK = "adapter_stock"
    ALIGNMENT = "alignment"


WEIGHT_FORMS = frozenset({Form.ADAPTER, Form.ADAPTER_STOCK, Form.ALIGNMENT})


class Artifact(TableRow):
    """One downloadable result of a job: a File, its form, and whether the gate holds it back."""

    __tablename__ = "artifacts"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    file_id: Mapped[str] = mapped_column(ForeignKey("files.id"), unique=True)
    form: Mapped[str]
    quarantined: Mapped[bool] = mapped_column(default=False)

    @classmethod
    def keys(cls) -> tuple[Index | UniqueConstraint, ...]:
        return (UniqueConstraint("job_id", "form"), Index(None, "quarantined"))


class BaseStatus(StrEnum):
    """`ready` once its alignment is published; only then are fine-tunes claimed and prompts answered.

    `retired` while the deployment serves another base; its rows and results stay.
    """

    ALIGNING = "aligning"
    READY = "ready"
    FAILED = "failed"
    RETIRED = "retired"


class BaseRow(TableRow):
    """A public base (`source`: local folder or hub id) and the frozen alignment adapter that goes with it.

    `alignment_file` is the File of the alignment artifact; `report` the align job's safety report.
    """

    __tablename__ = "base_models"
    source: Mapped[str]
    status: Mapped[str] = mapped_column(default=BaseStatus.ALIGNING)
    context: Mapped[int]
    alignment_job: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    alignment_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    report: Mapped[JsonObject | None]


class Model(TableRow):
    """A fine-tuned model; its `id` is the name that clients use. Registered only when the gate let it pass."""

    __tablename__ = "models"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    base_id: Mapped[str] = mapped_column(ForeignKey("base_models.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), unique=True)
    artifact_id: Mapped[str] = mapped_column(ForeignKey("artifacts.id"))
    deleted_at: Mapped[float | None]

    @classmethod
    def keys(cls) -> tuple[Index | UniqueConstraint, ...]:
        return (Index(None, "project_id", "created_at", "seq"), Index(None, "artifact_id"))


class Worker(TableRow):
    """A Celery process that takes jobs; `draining` tells its supervisor to save and hand back.

    `faults`: jobs that it lost in a row before any of them began; after some it takes none until `resting_until`.
    `queues`: the names of its queues with a comma before and after each; None of an earlier release's workers.
    """

    __tablename__ = "workers"
    host: Mapped[str]
    devices: Mapped[str]
    draining: Mapped[bool] = mapped_column(default=False)
    seen_at: Mapped[float] = mapped_column(default=db_now())
    queues: Mapped[str | None]
    faults: Mapped[int] = mapped_column(default=0, server_default="0")
    resting_until: Mapped[float | None]

    @classmethod
    def keys(cls) -> tuple[Index | UniqueConstraint, ...]:
        return (Index(None, "seen_at"),)


class Reply(TableRow):
    """A POST's stored answer, so that a repeated request has one effect. `id` is internal."""

    __tablename__ = "replies"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    route: Mapped[str]
    key: Mapped[str | None] = mapped_column(String(255))
    body_hash: Mapped[str] = mapped_column(String(64))
    status: Mapped[int]
    body: Mapped[JsonObject]

    @classmethod
    def keys(cls) -> tuple[Index | UniqueConstraint, ...]:
        return (
            UniqueConstraint("project_id", "route", "key"),
            Index(None, "project_id", "route", "body_hash"),
            Index(None, "created_at"),
        )

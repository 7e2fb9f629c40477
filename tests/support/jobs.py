"""Files, jobs and results as the service's own functions make them: the one way in which a test gets a job."""

from obstore.store import MemoryStore

from app.core import deployment, files
from app.core.ids import Prefix, new_id
from app.core.jobs import ended, jobs, lease, policy
from app.core.settings import LeaseSettings, Settings
from app.core.storage.blobs import BlobStore, put_bytes
from app.core.storage.blobs.objects import ObjectBlobs
from app.core.storage.database import Database
from app.core.storage.tables import File, FileStatus, Form, Job, Project
from finetuning.contract.recipe import Recipe

QUICK = LeaseSettings(
    beat_seconds=0.2,
    ttl_seconds=3.0,
    self_stop_seconds=1.5,
    kill_seconds=2.0,
    reaper_tick_seconds=0.2,
    rewake_seconds=0.5,
    backoff_seconds=0.05,
)
# what a job that may succeed has to publish
SUCCESS = (Form.METRICS, Form.REPORTS, Form.ADAPTER, Form.ADAPTER_STOCK)


def bind_as_it_is(database: Database, blobs: BlobStore) -> None:
    """Make this store the database's own, whatever its rows name and it lacks, and let the sweep begin."""
    deployment.adopt(database, blobs)
    deployment.check(database, blobs, most_share=0.0, accept=True)


def patient(settings: Settings) -> Settings:
    """The same settings, but nothing runs out or is sent again unless a test makes it old."""
    slow = {"ttl_seconds": 300.0, "rewake_seconds": 300.0}
    return settings.model_copy(update={"lease": settings.lease.model_copy(update=slow)})


def published(held: lease.Lease, *forms: Form, blobs: BlobStore | None = None) -> ended.Published:
    """What an attempt would have uploaded in these forms; without a store the blobs are only named."""
    prefix = f"{held.prefix}/result"
    results: list[ended.PublishedFile] = []
    for form in forms:
        key, data = f"{prefix}/{form}.zip", f"{form} of {held.job_id}".encode()
        blob = put_bytes(blobs or ObjectBlobs(MemoryStore()), key, data)
        results.append(ended.PublishedFile(form, f"{form}.zip", blob))
    return ended.Published(prefix, tuple(results), {"safety": {"gate": {"decision": "pass"}}}, 1234)


def add_file(
    database: Database,
    project: Project,
    settings: Settings,
    *,
    rows: int = 100,
    status: FileStatus = FileStatus.PROCESSED,
    data: bytes | None = None,
    blobs: BlobStore | None = None,
    **found: object,
) -> File:
    """A file of this project that was found to have `rows` rows, and whatever else is said of it.

    Without a store its bytes are only named.
    """
    file_id = new_id(Prefix.FILE)
    with database.writing() as session:
        key = files.blob_key(project.id, file_id)
        blob = put_bytes(blobs or ObjectBlobs(MemoryStore()), key, file_id.encode() if data is None else data)
        new = files.NewFile(file_id, blob, "train.jsonl", status, {"format": "chat", "rows": rows, **found})
        files.add_file(session, project.id, new, limits=settings.limits)
        session.commit()
        return files.get_file(session, project.id, file_id)


def add_job(
    database: Database,
    project: Project,
    settings: Settings,
    *,
    queued: bool = True,
    recipe: Recipe | None = None,
    **wishes: object,
) -> Job:
    """A job of this project over a fresh file of 100 rows, past its checks unless `queued` is False.

    With a `recipe` of its own it trains by that one, whatever its request resolves to.
    """
    if "training_file" not in wishes:
        wishes["training_file"] = add_file(database, project, settings).id
    request = policy.CreateJob.model_validate({"model": "tiny", **wishes})
    with database.writing() as session:
        job = jobs.add_job(session, settings, project, request)
        if queued:
            named = policy.get_policy(project.policy)
            resolved = recipe or policy.resolve_recipe(named, "tiny", request, rows=100)
            jobs.pass_checks(session, job.id, resolved)
        session.commit()
        return jobs.get_job(session, project.id, job.id)

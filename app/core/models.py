"""Bases with their alignments, and fine-tuned models: which names a project may use, and what answers for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.core.broker import Wake
from app.core.errors import Forbidden, NotFound, ServiceBusy, StartRefused, model_not_found
from app.core.files import blob_of
from app.core.ids import Prefix, new_id
from app.core.jobs.jobs import (
    NewEvent,
    append_events,
    base_trouble,
    recipe_columns,
    served_alignment,
    tell_waiting,
    wake_for,
)
from app.core.jobs.policy import get_policy, resolve_alignment
from app.core.projects import ensure_project
from app.core.settings import Settings
from app.core.storage.blobs import Blob
from app.core.storage.database import change, db_now, one_at_a_time
from app.core.storage.job_states import LIVE, JobState
from app.core.storage.tables import Artifact, BaseRow, BaseStatus, File, Job, Model
from finetuning.contract.recipe import JobKind, Recipe
from finetuning.recipes.library import base_of, is_known


@dataclass(frozen=True)
class Target:
    """What answers for a model name: this adapter on the public base, or the public base alone.

    A base answers with its alignment, a fine-tuned model with alignment and task adapter joined (`adapter_stock`).
    `context`: the most tokens that the base reads and writes together.
    """

    model: str
    base_id: str
    adapter: Blob | None
    context: int

    @property
    def served(self) -> str:
        """The name by which a model server is asked, and from which it finds the adapter by itself."""
        if self.adapter is None:
            return PUBLIC_BASE
        return f"{self.adapter.key}@{self.adapter.sha256}:{self.adapter.size_bytes}"


PUBLIC_BASE = "public"


class BaseTaken(StartRefused):
    """Two sources claim one base id; the message says what to do."""


class OtherBase(StartRefused):
    """The deployment serves another base than this process is set to; the message names the verb that changes it."""


def base_id_of(name: str) -> str:
    """The id of a base from its name in settings: `smollm2`, `tiny`, a hub id or a local folder."""
    return base_of(name).id


def ensure_base(session: Session, settings: Settings) -> tuple[Wake, ...]:
    """Serve the configured base: insert it with its align job unless it is there.

    Safe to repeat. A failed alignment is tried again at the next start, and a base that is aligned for another policy
    than the service's is aligned again. Returns wake-ups for after the commit. Raises BaseTaken when the id belongs to
    another source, OtherBase while another base is served: `retire_base` ends that.
    """
    one_at_a_time(session)
    require_base(session, settings)
    known = base_of(settings.base)
    base = session.scalars(select(BaseRow).where(BaseRow.id == known.id)).one_or_none()
    if base is None:
        base = BaseRow(id=known.id, source=settings.base, context=known.context, status=BaseStatus.FAILED)
        session.add(base)
        session.flush()
    elif _same_source(base.source) != _same_source(settings.base):
        raise BaseTaken(
            f"The base id '{base.id}' in this data folder means '{base.source}', not '{settings.base}'. "
            "Set IMMUNOTUNE_BASE back, rename the folder of the new base, or take another IMMUNOTUNE_DATA."
        )
    base.context = known.context  # an earlier release may have known another
    if base.status == BaseStatus.RETIRED:
        return _bring_back(session, settings, base)
    is_of_today = served_alignment(session, base) == _alignment_recipe(settings).name
    is_waiting = base.status == BaseStatus.ALIGNING
    if base.status == BaseStatus.FAILED or not (is_of_today or is_waiting):
        return _align(session, settings, base)
    return ()


def require_base(session: Session, settings: Settings) -> None:
    """Raises OtherBase where the deployment serves a base, and not the one that this process is set to."""
    served = session.scalars(select(BaseRow).where(BaseRow.status != BaseStatus.RETIRED).order_by(BaseRow.seq)).all()
    if served and base_id_of(settings.base) not in {base.id for base in served}:
        now = served[0]
        raise OtherBase(
            f"This deployment serves the base '{now.id}', and IMMUNOTUNE_BASE is '{settings.base}'. Set it to "
            f"'{now.source}'; or, to serve another base from now on, run `immunotune retire {now.id}` once and start "
            "every process with the new one. Jobs of a retired base wait until it is served again."
        )


def served_source(session: Session) -> str | None:
    """What IMMUNOTUNE_BASE must name to serve the base that is served; None before there is one."""
    served = select(BaseRow.source).where(BaseRow.status != BaseStatus.RETIRED).order_by(BaseRow.seq)
    return session.scalars(served).first()


def retire_base(session: Session, base_id: str) -> int:
    """Stop serving a base, so that the next start may serve another; returns how many jobs wait for it from now on.

    Safe to repeat. Its rows and results stay, and a start with it after the other is retired serves it again. Raises
    NotFound `model_not_found`.
    """
    one_at_a_time(session)
    base = get_base(session, base_id)
    if base.status == BaseStatus.RETIRED:
        return 0
    base.status = BaseStatus.RETIRED
    session.flush()
    return tell_waiting(session, base)


def retire_others(session: Session, settings: Settings) -> None:
    """Retire whatever is served beside the configured base: for one user's own machine, who just named the base."""
    own = base_id_of(settings.base)
    served = BaseRow.id != own, BaseRow.status != BaseStatus.RETIRED
    for base_id in session.scalars(select(BaseRow.id).where(*served)).all():
        retire_base(session, base_id)


def _bring_back(session: Session, settings: Settings, base: BaseRow) -> tuple[Wake, ...]:
    """A retired base is served again: with the alignment that it has, or the align job that it left waiting."""
    job = get_alignment(session, base.id)
    is_of_today = served_alignment(session, base) == _alignment_recipe(settings).name
    if base.alignment_file is not None and is_of_today:
        base.status = BaseStatus.READY
    elif job is not None and job.state in LIVE:
        base.status = BaseStatus.ALIGNING
        session.flush()
        return (wake_for(job),)
    else:
        return _align(session, settings, base)
    session.flush()
    return ()


def _align(session: Session, settings: Settings, base: BaseRow) -> tuple[Wake, ...]:
    # align jobs belong to the operator: no key of this project exists
    project = ensure_project(session, "operator", policy=settings.policy, org_slug="operator")
    job = Job(
        id=new_id(Prefix.JOB),
        project_id=project.id,
        kind=JobKind.ALIGN,
        base_id=base.id,
        policy=settings.policy,
        request={},
        **recipe_columns(_alignment_recipe(settings)),
        queue=settings.train_queue,
        state=JobState.QUEUED,
        stage="wait",
    )
    session.add(job)
    session.flush()
    base.status = BaseStatus.ALIGNING
    base.alignment_job = job.id
    append_events(session, job.id, [NewEvent(f"Created alignment job: {job.id}")])
    return (wake_for(job),)


def _alignment_recipe(settings: Settings) -> Recipe:
    policy = get_policy(settings.policy, queue=settings.train_queue, release=settings.release)
    return resolve_alignment(settings.base, policy)


def get_base(session: Session, base_id: str) -> BaseRow:
    """A base by its id. Raises NotFound `model_not_found`."""
    base = session.scalars(select(BaseRow).where(BaseRow.id == base_id)).one_or_none()
    if base is None:
        raise model_not_found(base_id)
    return base


def get_alignment(session: Session, base_id: str) -> Job | None:
    """The newest align job of a base, whose stage and progress people watch while the base is not ready."""
    of_base = select(Job).join(BaseRow, BaseRow.alignment_job == Job.id).where(BaseRow.id == base_id)
    return session.scalars(of_base).one_or_none()


def resolve(session: Session, project_id: str, name: str) -> Target:
    """What answers for this name in this project. Raises NotFound `model_not_found`, ServiceBusy `model_loading`."""
    found = get_model(session, project_id, name)
    base = get_base(session, found.base_id) if isinstance(found, Model) else found
    _refuse_retired(base)
    if isinstance(found, Model):
        return Target(found.id, found.base_id, _adapter(session, found.artifact_id), base.context)
    trouble = base_trouble(found)
    if trouble is not None:
        raise ServiceBusy(trouble, code="model_loading", retry_after=30.0)
    if found.status != BaseStatus.READY:
        raise ServiceBusy(
            f"The base '{found.id}' is being aligned. Try again when GET /v1/models shows it as ready.",
            code="model_loading",
            retry_after=10.0,
        )
    return Target(found.id, found.id, _alignment(session, found), found.context)


def list_models(session: Session, project_id: str) -> Sequence[BaseRow | Model]:
    """All bases, the one that is served first, then this project's models, newest first."""
    bases = session.scalars(select(BaseRow).order_by(BaseRow.status == BaseStatus.RETIRED, BaseRow.seq)).all()
    own = select(Model).where(Model.project_id == project_id, Model.deleted_at.is_(None))
    return [*bases, *session.scalars(own.order_by(Model.created_at.desc(), Model.seq.desc()))]


def get_model(session: Session, project_id: str, name: str) -> BaseRow | Model:
    """One base or model of this project. Raises NotFound `model_not_found`."""
    own = Model.id == name, Model.project_id == project_id, Model.deleted_at.is_(None)
    model = session.scalars(select(Model).where(*own)).one_or_none()
    return model if model is not None else get_base(session, name)


def get_origin(session: Session, item: BaseRow | Model) -> tuple[BaseRow, Job | None]:
    """The base behind an item of that list, and the job that made it: an alignment, or a fine-tune."""
    if isinstance(item, BaseRow):
        return item, get_alignment(session, item.id)
    return get_base(session, item.base_id), session.scalars(select(Job).where(Job.id == item.job_id)).one()


def delete_model(session: Session, project_id: str, name: str) -> Model:
    """Take a model out of service; its artifacts stay. Raises NotFound, Forbidden `model_protected` for a base."""
    found = get_model(session, project_id, name)
    if isinstance(found, BaseRow):
        raise Forbidden("A base belongs to the operator and cannot be deleted here.", code="model_protected")
    gone = update(Model).where(Model.id == name, Model.deleted_at.is_(None)).values(deleted_at=db_now())
    if change(session, gone) == 0:
        raise model_not_found(name)
    return found


def _adapter(session: Session, artifact_id: str) -> Blob:
    of_artifact = select(File).join(Artifact, Artifact.file_id == File.id).where(Artifact.id == artifact_id)
    return blob_of(session.scalars(of_artifact).one())


def _alignment(session: Session, base: BaseRow) -> Blob:
    # a ready base without its file is an error, never an unaligned answer
    return blob_of(session.scalars(select(File).where(File.id == base.alignment_file)).one())


def _refuse_retired(base: BaseRow) -> None:
    if base.status == BaseStatus.RETIRED:
        raise NotFound(base_trouble(base) or "", code="model_not_found", param="model")


def _same_source(name: str) -> str:
    """A base's source however it is spelled: by its short name, its id, or a path to one folder."""
    if is_known(name):
        return base_of(name).id
    return str(Path(name).resolve()) if Path(name).is_dir() else name

"""Bases with their alignments, and fine-tuned models.

Knows which names a project may use and what a model server needs to answer for them; must not know HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.core.blobs import Blob
from app.core.broker import Wake
from app.core.settings import Settings
from app.core.tables import BaseModel, Job, Model


@dataclass(frozen=True)
class Target:
    """What answers for a model name: `served` is the name on the model server's wire (artifact id or base id)."""

    model: str
    base_id: str
    served: str
    adapter: Blob | None


@dataclass(frozen=True)
class Serving:
    """What a model server loads for one served name; None means: without it."""

    base_id: str
    base_source: str
    alignment: Blob | None
    adapter: Blob | None


def base_id_of(name: str) -> str:
    """The wire id of a base from its name in settings: `smollm2`, `tiny`, a hub id or a local folder."""
    raise NotImplementedError


def ensure_base(session: Session, settings: Settings) -> tuple[Wake, ...]:
    """Insert the configured base and, unless it is ready or being aligned, its align job. Safe to repeat.

    A failed alignment is tried again at the next start. Returns wake-ups for after the commit.
    """
    raise NotImplementedError


def get_base(session: Session, base_id: str) -> BaseModel:
    """A base by its id. Raises NotFound `model_not_found`."""
    raise NotImplementedError


def get_alignment(session: Session, base_id: str) -> Job | None:
    """The newest align job of a base, whose stage and progress people watch while the base is not ready."""
    raise NotImplementedError


def resolve(session: Session, project_id: str, name: str) -> Target:
    """What answers for this name in this project. Raises NotFound `model_not_found`, ServiceBusy `model_loading`."""
    raise NotImplementedError


def find_serving(session: Session, served: str) -> Serving | None:
    """What a model server loads for an artifact id or base id; None when it is unknown or may not be served."""
    raise NotImplementedError


def list_models(session: Session, project_id: str) -> Sequence[BaseModel | Model]:
    """All bases, then this project's models, newest first."""
    raise NotImplementedError


def get_model(session: Session, project_id: str, name: str) -> BaseModel | Model:
    """One base or model of this project. Raises NotFound `model_not_found`."""
    raise NotImplementedError


def delete_model(session: Session, project_id: str, name: str) -> Model:
    """Take a model out of service; its artifacts stay. Raises NotFound, Forbidden `model_protected` for a base."""
    raise NotImplementedError

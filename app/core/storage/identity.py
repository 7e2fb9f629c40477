"""Whose database and whose blob store this is: one id, kept in both, so that neither is used with another's."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.core.errors import StartRefused
from app.core.storage.blobs import BlobExists, BlobMissing, BlobStore, put_bytes, read_bytes
from app.core.storage.tables import Deployment

STORE_KEY = "deployment/id"


class WrongDeployment(StartRefused):
    """This process, its database and its store do not belong together; the message says what to do."""


def deployment_of(session: Session) -> Deployment | None:
    """The row of the deployment whose database this is; None before its first start."""
    return session.scalars(select(Deployment).order_by(Deployment.seq)).first()


def id_in_store(blobs: BlobStore) -> str | None:
    """The id of the deployment whose store this is; None where none has begun to use it."""
    try:
        return read_bytes(blobs, STORE_KEY).decode("utf-8", "replace")
    except BlobMissing:
        return None


def claim_store(blobs: BlobStore, deployment_id: str) -> str:
    """Write the id into a store that has none; returns the one that it has from now on, which another may have set."""
    try:
        put_bytes(blobs, STORE_KEY, deployment_id.encode())
    except BlobExists:
        return id_in_store(blobs) or deployment_id
    return deployment_id


def belong_together(session: Session, blobs: BlobStore) -> bool:
    """Whether database and store carry one id."""
    own = deployment_of(session)
    return own is not None and own.id == id_in_store(blobs)

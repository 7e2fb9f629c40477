"""Whose database and whose blob store this is: one id, kept in both, so that neither is used with another's."""

from contextlib import suppress

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.core.errors import StartRefused
from app.core.storage.blobs import BlobExists, BlobMissing, BlobStore, put_bytes, read_bytes
from app.core.storage.tables import Deployment

STORE_KEY = "deployment/id"
# somebody found that two databases count this store's sweeps: none deletes until an audit
DISPUTED_KEY = "deployment/disputed"
_SWEEPS = "deployment/sweeps/"
_KEPT_SWEEPS = 10


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


def newest_sweep(blobs: BlobStore) -> int:
    """The number of the last sweep of this store; no database of its own counts fewer, unless it was set back."""
    return max((int(blob.key.removeprefix(_SWEEPS)) for blob in blobs.list(_SWEEPS)), default=0)


def note_sweep(blobs: BlobStore, number: int) -> bool:
    """Count a sweep in the store, too; False where it has that number already: another database counts there."""
    if newest_sweep(blobs) >= number:
        return False
    try:
        put_bytes(blobs, f"{_SWEEPS}{number:012}", b"")
    except BlobExists:
        return False
    for blob in list(blobs.list(_SWEEPS)):
        if int(blob.key.removeprefix(_SWEEPS)) < number - _KEPT_SWEEPS:
            blobs.delete(blob.key)
    return True


def dispute(blobs: BlobStore) -> None:
    """Let nobody delete from this store before an audit."""
    with suppress(BlobExists):
        put_bytes(blobs, DISPUTED_KEY, b"")


def is_disputed(blobs: BlobStore) -> bool:
    """Whether `dispute` was called since the last audit that passed."""
    return any(blob.key == DISPUTED_KEY for blob in blobs.list(DISPUTED_KEY))

"""The deployment: the database and the blob store that belong together, and what an operator does when they do not.

Every process asks `bind` at its start and does not go on where it raises.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import structlog
from sqlalchemy import case, delete, make_url, select, update
from sqlalchemy.orm import Session

from app.core.ids import Prefix, new_id
from app.core.jobs.sweep import PREFIXES, Audit, audit, too_many
from app.core.jobs.waiting import route
from app.core.models import require_base
from app.core.settings import Settings
from app.core.storage.blobs import BlobStore, open_blobs
from app.core.storage.database import Database, db_now, one_at_a_time, open_database
from app.core.storage.identity import (
    DISPUTED_KEY,
    STORE_KEY,
    WrongDeployment,
    belong_together,
    claim_store,
    deployment_of,
    id_in_store,
    is_disputed,
    newest_sweep,
)
from app.core.storage.schema import require_newest
from app.core.storage.tables import Deployment, File, Job, SweepMark

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_SET_BACK = (
    "Set IMMUNOTUNE_DATABASE_URL and IMMUNOTUNE_BLOB_URL to a database and a store that belong together. If you have "
    "restored one of them and mean these two, stop every process and run `immunotune adopt`."
)


def bind(database: Database, blobs: BlobStore, settings: Settings) -> str:
    """Make sure that database and store belong together; returns the deployment's id, made at the first start.

    What an earlier release left in one data folder is taken over where rows and bytes match. Raises WrongDeployment,
    and WrongSchema before anything else is read.
    """
    with database.reading() as session:
        require_newest(session.connection())
    newest = newest_sweep(blobs)  # before the row is read, for a sweep may go on meanwhile
    with database.writing() as session:
        one_at_a_time(session)
        own = deployment_of(session) or _first_start(session, blobs, settings)
        session.commit()
    # the row first: whoever ends between the two finds at the next start that the store is still to be claimed
    stored = claim_store(blobs, own.id) if own.bound_at is None else id_in_store(blobs)
    if stored is None:
        raise WrongDeployment(f"The blob store is not this database's: nothing says whose it is. {_SET_BACK}")
    if stored != own.id:
        raise WrongDeployment(f"The blob store belongs to deployment {stored}, the database to {own.id}. {_SET_BACK}")
    if newest > own.sweeps:
        raise WrongDeployment(
            f"The database is older than the blob store: restored, or a copy of the one in use. {_SET_BACK}"
        )
    if own.bound_at is None:
        with database.writing() as session:
            session.execute(update(Deployment).where(Deployment.id == own.id).values(bound_at=db_now()))
            session.commit()
    return own.id


def require_ours(settings: Settings) -> None:
    """Raises StartRefused where this process is set to another store or base than the deployment's.

    For processes that only work in a deployment: no keys, no queue. Raises what a database that is down raises.
    """
    database = open_database(settings)
    try:
        bind(database, open_blobs(settings), settings)
        with database.reading() as session:
            require_base(session, settings)
    finally:
        database.close()


def serve_queue(session: Session, settings: Settings) -> None:
    """Let jobs go to the configured queue from now on, those that wait already too: the newest start of an API decides.

    Call after `bind`.
    """
    own = deployment_of(session)
    assert own is not None, "a deployment is bound first"
    if own.queue != settings.train_queue:
        log.info("deployment.queue", before=own.queue, now=settings.train_queue)
        own.queue = settings.train_queue
    route(session, settings.train_queue)


def adopt(database: Database, blobs: BlobStore) -> str:
    """Bind this database and this store to each other under a new id, whatever they belonged to; returns the id.

    Whoever else uses one of the two with another refuses from its next start or sweep on. Nothing is swept until an
    audit passes.
    """
    with database.writing() as session:
        one_at_a_time(session)
        blobs.delete(STORE_KEY)
        own = claim_store(blobs, new_id(Prefix.DEPLOYMENT))
        before = deployment_of(session)
        session.execute(delete(Deployment))
        session.execute(delete(SweepMark))
        kept = {} if before is None else {"pepper": before.pepper, "queue": before.queue}
        session.add(Deployment(id=own, bound_at=db_now(), audit_due=True, sweeps=newest_sweep(blobs), **kept))
        session.commit()
    return own


def check(database: Database, blobs: BlobStore, *, most_share: float, accept: bool = False) -> Audit:
    """Hold rows against bytes; where that passes, or is accepted, the sweep may go on. Raises WrongDeployment.

    Where two databases swept this store, the one that is audited gets a new id with it, and the other one is out.
    """
    with database.reading() as session:  # it takes as long as a listing of the store
        if not belong_together(session, blobs):
            raise WrongDeployment(f"Database and blob store do not belong together. {_SET_BACK}")
        found = audit(session, blobs)
    if not (accept or found.passes(most_share)):
        return found
    newest, disputed = newest_sweep(blobs), is_disputed(blobs)
    own_id = {"id": new_id(Prefix.DEPLOYMENT)} if disputed else {}
    with database.writing() as session:
        sweeps = case((Deployment.sweeps < newest, newest), else_=Deployment.sweeps)
        session.execute(update(Deployment).values(audit_due=False, sweeps=sweeps, **own_id))
        session.commit()
    if disputed:
        blobs.delete(STORE_KEY)
        claim_store(blobs, own_id["id"])
        blobs.delete(DISPUTED_KEY)
    return found


def _first_start(session: Session, blobs: BlobStore, settings: Settings) -> Deployment:
    stored = id_in_store(blobs)
    if stored is not None:
        raise WrongDeployment(f"The blob store belongs to deployment {stored}, the database to none yet. {_SET_BACK}")
    rows, bytes_there = _any_rows(session), any(next(iter(blobs.list(prefix)), None) for prefix in PREFIXES)
    audit_due = False
    if bytes_there and not rows:
        raise WrongDeployment(f"The blob store holds bytes, and the database knows of no job and no file. {_SET_BACK}")
    if bytes_there or _any_file(session):
        before = audit(session, blobs)
        is_match = before.missing * 10 <= before.needed and not too_many(before.unknown, before.total, 0.5)
        if not (is_match and _in_one_folder(settings)):
            raise WrongDeployment(
                "Database and blob store are of an earlier release and do not say that they belong together. "
                f"Of {before.needed} files in the database {before.missing} are missing in the store, and of its "
                f"{before.total} blobs the database does not know {before.unknown}. If they do belong together, run "
                "`immunotune adopt` once."
            )
        audit_due = not before.passes(settings.limits.sweep_share)
    row = Deployment(id=new_id(Prefix.DEPLOYMENT), audit_due=audit_due)
    session.add(row)
    session.flush()
    return row


def _any_rows(session: Session) -> bool:
    return any(session.scalars(select(table.seq).limit(1)).first() is not None for table in (Job, File))


def _any_file(session: Session) -> bool:
    return session.scalars(select(File.seq).where(File.deleted_at.is_(None)).limit(1)).first() is not None


def _in_one_folder(settings: Settings) -> bool:
    """Whether database and store are files below the data folder: then one copy or one mistake takes both."""
    database, store = make_url(settings.database_url), urlsplit(settings.blob_url)
    if database.get_backend_name() != "sqlite" or not database.database or store.scheme != "file":
        return False
    places = (Path(database.database), Path(unquote(store.path)))
    return all(place.resolve().is_relative_to(settings.data) for place in places)

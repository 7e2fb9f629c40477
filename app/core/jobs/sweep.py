"""The sweep: which stored bytes some row still needs, and how the others go: marked by one sweep, deleted by the next.

What no row of this database accounts for may be another deployment's or a newer database's, so the sweep stops where
much of the store is that; bytes that an ended job left are its own to delete.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import structlog
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from app.core.settings import Settings
from app.core.storage.blobs import BlobStore, StoredBlob
from app.core.storage.database import Database, TurnNumber, alone, change, db_now, read_clock
from app.core.storage.identity import (
    belong_together,
    deployment_of,
    dispute,
    id_in_store,
    is_disputed,
    note_sweep,
)
from app.core.storage.job_states import LIVE, JobState
from app.core.storage.tables import Artifact, Checkpoint, Deployment, File, Job, SweepMark
from app.core.telemetry import BLOBS_SWEPT, SWEEP_STOPPED
from finetuning.contract.recipe import JobKind

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

PREFIXES = ("files/", "jobs/")
_AT_ONCE = 500
# a share of little says nothing: uploads that were cut off leave a few blobs in any store
_FEW = 20
T = TypeVar("T")


@dataclass(frozen=True)
class Standing:
    """What the rows say of some blobs: keys that are needed, that no row accounts for, and of cancelled jobs."""

    needed: frozenset[str]
    unknown: frozenset[str]
    hurried: frozenset[str]


@dataclass
class _Look:
    """What one look at the store found: how many blobs there are, how many are nobody's, and which may be deleted."""

    total: int = 0
    unknown: int = 0
    doomed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Audit:
    """Rows against bytes: how many blobs rows need, how many of those are missing, and how many are nobody's."""

    needed: int
    missing: int
    total: int
    unknown: int

    def passes(self, most_share: float) -> bool:
        """Whether nothing is missing and the sweep may delete what is nobody's."""
        return self.missing == 0 and not too_many(self.unknown, self.total, most_share)


def sweep_in_turn(database: Database, blobs: BlobStore, settings: Settings) -> int:
    """Sweep if none did for `sweep_seconds`, in this process alone. Returns how many blobs were deleted."""
    limits = settings.limits
    with alone(database, TurnNumber.SWEEP) as elected:
        if not elected:
            return 0
        every = limits.sweep_seconds
        is_due = (
            Deployment.swept_at.is_(None)
            | (Deployment.swept_at < db_now() - every)
            | (Deployment.swept_at > db_now() + every)  # a clock went back
        )
        with database.writing() as session:
            taken = change(session, update(Deployment).where(is_due).values(swept_at=db_now()))
            session.commit()
        if not taken:
            return 0
        return sweep(
            database,
            blobs,
            older_than_seconds=limits.orphan_blob_seconds,
            most_share=limits.sweep_share,
            reports_days=settings.retention.reports_days,
        )


def sweep(
    database: Database,
    blobs: BlobStore,
    *,
    older_than_seconds: float,
    most_share: float = 0.1,
    reports_days: float = 400.0,
) -> int:
    """Mark blobs that no row needs, and delete those that an earlier sweep marked. Returns how many were deleted.

    They are cut-off uploads, lost attempts, checkpoints of ended jobs; those of a cancelled job go whatever their age.
    Nothing is deleted where the store is not this database's, an audit is due, or more than `most_share` is nobody's.
    """
    began = _begin(database, blobs)
    if began is None:
        SWEEP_STOPPED.set(1)
        return 0
    found = _look(database, blobs, older_than_seconds=older_than_seconds, reports_days=reports_days, began=began)
    if too_many(found.unknown, found.total, most_share):
        SWEEP_STOPPED.set(1)
        log.error("sweep.stopped", reason="too much is nobody's", unknown=found.unknown, total=found.total)
        return 0
    SWEEP_STOPPED.set(0)
    swept = _delete(database, blobs, found.doomed, reports_days=reports_days)
    with database.writing() as session:  # marks of what is needed again, or gone
        session.execute(delete(SweepMark).where(SweepMark.seen_at < began))
        session.commit()
    if swept:
        BLOBS_SWEPT.inc(swept)
        log.info("blobs.swept", count=swept)
    return swept


def _begin(database: Database, blobs: BlobStore) -> float | None:
    """Count this sweep in database and store; the database's time, or None where nothing may be swept."""
    stored, disputed = id_in_store(blobs), is_disputed(blobs)  # no transaction waits for the store
    with database.writing() as session:
        own, began = deployment_of(session), read_clock(session)
        if own is None or own.id != stored:
            log.error("sweep.stopped", reason="the store is not this database's")
            return None
        if own.audit_due or disputed:
            log.error("sweep.stopped", reason="an audit is due: run `immunotune audit`")
            return None
        own.sweeps += 1
        number = own.sweeps
        session.commit()  # the database counts first: killed before the store does, it is still never behind
    if not note_sweep(blobs, number):
        dispute(blobs)
        log.error("sweep.stopped", reason="another database sweeps this store, or this one was set back")
        return None
    return began


def too_many(unknown: int, total: int, most_share: float) -> bool:
    """Whether so much of a store is nobody's that it may be somebody else's."""
    return unknown > max(_FEW, most_share * total)


def standing_of(session: Session, keys: Sequence[str], *, reports_days: float = 400.0) -> Standing:
    """What the rows say of these keys, in a few statements however many keys there are.

    Reports that lie beside a job's files go when all of these are deleted, or so many days after its end.
    """
    files = dict(session.execute(select(File.blob_key, File.deleted_at).where(File.blob_key.in_(keys))).all())
    ids = {job_id for key in keys if (job_id := _job_of(key)) is not None}
    found = session.execute(select(Job.id, Job.state, Job.result).where(Job.id.in_(ids))).all()
    jobs = {job_id: (state, result or {}) for job_id, state, result in found}
    erased = _without_files(session, ids) | _long_ended(session, ids, reports_days)
    needed: set[str] = {key for key, deleted_at in files.items() if deleted_at is None}
    hurried: set[str] = set()
    for key in keys:
        job_id = _job_of(key)
        state, result = jobs.get(job_id or "", ("", {}))
        if state in LIVE or (job_id not in erased and result.get("prefix") in _folders_of(key)):
            needed.add(key)
        if state == JobState.CANCELLED:
            hurried.add(key)
    unknown = {key for key in keys if key not in files and _job_of(key) not in jobs}
    return Standing(frozenset(needed), frozenset(unknown), frozenset(hurried))


def audit(session: Session, blobs: BlobStore) -> Audit:
    """Hold rows against bytes: every file that is shown, and the checkpoints of live jobs that can be used."""
    # before the listing: what is stored while it goes on would be taken for missing
    wanted = set(session.scalars(select(File.blob_key).where(File.deleted_at.is_(None))))
    usable = Job.state.in_(LIVE), Checkpoint.unusable_at.is_(None)
    of_live = select(Checkpoint.prefix).join(Job, Job.id == Checkpoint.job_id).where(*usable)
    wanted.update(f"{prefix}/contents.json" for prefix in session.scalars(of_live))
    total = unknown = 0
    stored: set[str] = set()
    for batch in _portions(_listed(blobs)):
        keys = [blob.key for blob in batch]
        stored.update(keys)
        total += len(keys)
        unknown += len(standing_of(session, keys).unknown)
    return Audit(len(wanted), len(wanted - stored), total, unknown)


def _look(
    database: Database, blobs: BlobStore, *, older_than_seconds: float, reports_days: float, began: float
) -> _Look:
    look = _Look()
    for batch in _portions(_listed(blobs)):
        with database.writing() as session:
            standing = standing_of(session, [blob.key for blob in batch], reports_days=reports_days)
            idle = [
                blob.key
                for blob in batch
                if blob.key not in standing.needed
                and (blob.age_seconds >= older_than_seconds or blob.key in standing.hurried)
            ]
            look.doomed += _mark(session, idle, began)
            session.commit()
        look.total += len(batch)
        look.unknown += len(standing.unknown.intersection(idle))
    return look


def _mark(session: Session, keys: Iterable[str], began: float) -> list[str]:
    """Mark these keys; returns those that an earlier sweep had marked."""
    by_mark = {_mark_of(key): key for key in keys}
    if not by_mark:
        return []
    again = update(SweepMark).where(SweepMark.id.in_(by_mark)).values(seen_at=began)
    marked = dict(session.execute(again.returning(SweepMark.id, SweepMark.created_at)).all())
    new = [{"id": mark, "created_at": began, "seen_at": began} for mark in by_mark.keys() - marked.keys()]
    if new:
        session.execute(insert(SweepMark), new)
    return [by_mark[mark] for mark, created_at in marked.items() if created_at < began]


def _delete(database: Database, blobs: BlobStore, doomed: Sequence[str], *, reports_days: float) -> int:
    swept = 0
    for keys in _portions(doomed):
        with database.reading() as session:
            if not belong_together(session, blobs):  # adopted meanwhile
                return swept
            needed = standing_of(session, keys, reports_days=reports_days).needed
        for key in keys:
            if key not in needed:
                try:
                    blobs.delete(key)
                    swept += 1
                except Exception:
                    log.exception("sweep.undeletable", key=key)
    return swept


def _without_files(session: Session, job_ids: Iterable[str]) -> set[str]:
    """Those of these jobs that had results, and have none that is still shown: their loose reports go, too."""
    shown = func.count(File.id).filter(File.deleted_at.is_(None))
    of_jobs = select(Artifact.job_id).join(File, File.id == Artifact.file_id).where(Artifact.job_id.in_(job_ids))
    return set(session.scalars(of_jobs.group_by(Artifact.job_id).having(shown == 0)))


def _portions(items: Iterable[T]) -> Iterator[list[T]]:
    """The items in lists as long as one statement takes."""
    left = iter(items)
    while portion := list(islice(left, _AT_ONCE)):
        yield portion


def _long_ended(session: Session, job_ids: Iterable[str], days: float) -> set[str]:
    ended = Job.id.in_(job_ids), Job.kind == JobKind.FINETUNE, Job.finished_at < db_now() - days * 86_400.0
    return set(session.scalars(select(Job.id).where(*ended)))


def _listed(blobs: BlobStore) -> Iterator[StoredBlob]:
    for prefix in PREFIXES:
        yield from blobs.list(prefix)


def _job_of(key: str) -> str | None:
    parts = key.split("/")
    return parts[1] if parts[0] == "jobs" and len(parts) >= 4 else None


def _folders_of(key: str) -> list[str]:
    parts = key.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _mark_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()

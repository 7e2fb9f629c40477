"""What the reaper does for the database while the broker hangs."""

import os
import signal

from celery import Celery
from sqlalchemy import select, update

from app.core.jobs import lease, reaper
from app.core.settings import Settings
from app.core.storage.blobs.folder import FolderBlobs
from app.core.storage.database import Database
from app.core.storage.job_states import JobState
from app.core.storage.tables import BaseRow, Job, Project
from tests.support.jobs import add_job, patient
from tests.support.waiting import wait_until
from worker.processes import StartedProgram


def lose_lease(database: Database, settings: Settings, job: Job) -> None:
    """Claim the job for a worker that is never heard of again, long ago."""
    with database.writing() as session:
        assert lease.claim(session, settings, job.id, "w") is not None
        session.execute(update(Job).where(Job.id == job.id).values(lease_until=Job.lease_until - 600))
        session.commit()


def is_queued(database: Database, job: Job) -> bool:
    with database.reading() as session:
        return session.scalars(select(Job.state).where(Job.id == job.id)).one() == JobState.QUEUED


def test_leases_are_taken_back_while_the_broker_hangs(
    database: Database,
    settings: Settings,
    project: Project,
    base: BaseRow,
    broker: Celery,
    broker_process: StartedProgram,
) -> None:
    """S6: each tick waited 30 s per queue, so a lease of 3 s was taken back after half a minute."""
    settings = patient(settings)
    jobs = [add_job(database, project, settings) for _ in range(2)]
    ticking = reaper.Reaper(database, broker, FolderBlobs(settings.data / "blobs"), settings)
    os.kill(broker_process.process.pid, signal.SIGSTOP)
    ticking.start()
    try:
        for job in jobs:  # at the second one the reaper waits for the broker already
            lose_lease(database, settings, job)
            wait_until(lambda job=job: is_queued(database, job), seconds=15)
    finally:
        os.kill(broker_process.process.pid, signal.SIGCONT)
        ticking.stop()

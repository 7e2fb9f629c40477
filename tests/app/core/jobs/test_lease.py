from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import select, update

from app.core import models
from app.core.broker import Wake
from app.core.errors import LeaseLost, NotFound
from app.core.jobs import ended, jobs, lease
from app.core.jobs.ended import ReleaseCause
from app.core.jobs.jobs import JobError, NewEvent
from app.core.jobs.lease import Beat, Lease, SavedCheckpoint
from app.core.settings import Settings
from app.core.storage.database import Database, Page, read_clock
from app.core.storage.tables import BaseRow, Checkpoint, File, Form, Job, Model, Project
from tests.support.jobs import SUCCESS, add_job, patient, published


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return patient(settings)


def claim(database: Database, settings: Settings, job: Job) -> Lease | None:
    with database.writing() as session:
        held = lease.claim(session, settings, job.id, "worker_one")
        session.commit()
    return held


def claimed(database: Database, settings: Settings, job: Job) -> Lease:
    held = claim(database, settings, job)
    assert held is not None
    return held


def now_of(database: Database, job: Job) -> Job:
    with database.reading() as session:
        return session.scalars(select(Job).where(Job.id == job.id)).one()


def release(database: Database, settings: Settings, held: Lease, cause: ReleaseCause) -> tuple[Wake, ...]:
    with database.writing() as session:
        wakes = ended.release(session, settings.lease, held, cause, message="handed back")
        session.commit()
    return wakes


def beat(database: Database, settings: Settings, held: Lease, said: Beat | None = None) -> lease.BeatReply:
    with database.writing() as session:
        answer = lease.beat(session, settings.lease, held, said or Beat(), worker_id="worker_one")
        session.commit()
    return answer


def saved(held: Lease, step: int) -> SavedCheckpoint:
    return SavedCheckpoint(step, f"{held.prefix}/checkpoints/{step}", "print", {"train_loss": 1.5})


def test_a_claim_gives_all_that_an_attempt_needs(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings)
    held = claimed(database, settings, job)
    found = now_of(database, job)
    with database.reading() as session:
        file = session.scalars(select(File).where(File.id == job.training_file)).one()
        assert found.lease_until is not None
        assert 0 < found.lease_until - read_clock(session) <= settings.lease.ttl_seconds
    assert (found.state, found.fence, found.worker_id, held.fence) == ("running", 1, "worker_one", 1)
    assert held.training is not None
    assert (held.training.key, held.training.sha256) == (file.blob_key, file.sha256)
    assert held.alignment is not None
    assert (held.validation, held.checkpoint, held.base_source) == (None, None, "tiny")
    assert held.prefix == f"jobs/{job.id}/1-{held.attempt}"


def test_a_claim_refuses_a_live_lease(database: Database, settings: Settings, project: Project, base: BaseRow) -> None:
    job = add_job(database, project, settings)
    claimed(database, settings, job)
    assert claim(database, settings, job) is None


def test_of_many_claims_at_once_one_wins(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings)
    with ThreadPoolExecutor(8) as pool:
        held = list(pool.map(lambda _: claim(database, settings, job), range(16)))
    assert sum(one is not None for one in held) == 1
    assert now_of(database, job).fence == 1


def test_a_project_runs_no_more_than_its_cap_however_many_claim(
    database: Database, settings: Settings, project: Project, baseline: Project, base: BaseRow
) -> None:
    own = [add_job(database, project, settings) for _ in range(5)]
    other = add_job(database, baseline, settings)
    with ThreadPoolExecutor(5) as pool:
        held = list(pool.map(lambda job: claim(database, settings, job), own))
    assert sum(one is not None for one in held) == settings.limits.running_jobs
    assert claim(database, settings, other) is not None


def test_jobs_that_are_unchecked_final_or_resting_are_not_claimed(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    unchecked = add_job(database, project, settings, queued=False)
    cancelled = add_job(database, project, settings)
    resting = add_job(database, project, settings)
    with database.writing() as session:
        jobs.cancel(session, project.id, cancelled.id)
        session.execute(update(Job).where(Job.id == resting.id).values(run_after=Job.run_after + 600))
        session.commit()
    assert [claim(database, settings, job) for job in (unchecked, cancelled, resting)] == [None] * 3


def test_a_fine_tune_waits_for_its_base_and_alignment_wakes_it(
    database: Database, settings: Settings, project: Project
) -> None:
    with database.writing() as session:
        (due,) = models.ensure_base(session, settings)
        session.commit()
        align = session.scalars(select(Job).where(Job.id == due.id)).one()
    job = add_job(database, project, settings)
    assert claim(database, settings, job) is None
    held = claimed(database, settings, align)
    assert (held.training, held.alignment, held.recipe.kind) == (None, None, "align")
    with database.writing() as session:
        wakes = ended.finish(session, held, published(held, Form.ALIGNMENT, Form.REPORTS))
        session.commit()
    assert wakes == (Wake("immunotune.run_job", job.id, "train.cpu"),)
    assert claimed(database, settings, job).alignment is not None


def test_a_beat_renews_the_lease_and_stores_the_news(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings)
    held = claimed(database, settings, job)
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == job.id).values(lease_until=Job.lease_until - 20, losses=2))
        session.commit()
    before = now_of(database, job).lease_until
    said = Beat((NewEvent("one"), NewEvent("two")), (saved(held, 20),), "train", {"step": 20, "total_steps": 60})
    assert beat(database, settings, held, said) == lease.BeatReply(draining=False)
    found = now_of(database, job)
    assert before is not None
    assert found.lease_until is not None
    assert found.lease_until > before
    assert (found.losses, found.stage, found.progress) == (0, "train", {"step": 20, "total_steps": 60})
    with database.reading() as session:
        (checkpoint,) = jobs.list_checkpoints(session, project.id, job.id, Page()).rows
        messages = [event.message for event in jobs.list_events(session, project.id, job.id, Page()).rows]
    assert (checkpoint.step, checkpoint.fence, checkpoint.metrics) == (20, 1, {"train_loss": 1.5})
    assert messages[:2] == ["two", "one"]


def test_a_draining_worker_learns_it_from_its_beat(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    with database.writing() as session:
        worker_id = lease.enrol_worker(session, host="here", devices="cpu")
        session.commit()
    job = add_job(database, project, settings)
    held = claimed(database, settings, job)
    with database.writing() as session:
        lease.drain_worker(session, worker_id)
        session.commit()
    with database.writing() as session:
        assert lease.beat(session, settings.lease, held, Beat(), worker_id=worker_id).draining
        session.commit()
    wakes = release(database, settings, held, ReleaseCause.DRAIN)
    assert wakes == (Wake("immunotune.run_job", job.id, "train.cpu"),)
    assert now_of(database, job).losses == 0
    assert claimed(database, settings, job).fence == 2


def test_the_next_attempt_starts_from_the_newest_checkpoint(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings)
    first = claimed(database, settings, job)
    beat(database, settings, first, Beat(checkpoints=(saved(first, 20), saved(first, 40))))
    release(database, settings, first, ReleaseCause.DRAIN)
    second = claimed(database, settings, job)
    assert second.checkpoint == saved(first, 40)


@pytest.mark.parametrize("way", ["cancel", "released", "reclaimed"])
def test_a_lost_lease_can_write_nothing(
    database: Database, settings: Settings, project: Project, base: BaseRow, way: str
) -> None:
    job = add_job(database, project, settings)
    held = claimed(database, settings, job)
    if way == "cancel":
        with database.writing() as session:
            jobs.cancel(session, project.id, job.id)
            session.commit()
    else:
        release(database, settings, held, ReleaseCause.DRAIN)
        if way == "reclaimed":
            claimed(database, settings, job)
    before = now_of(database, job)
    with pytest.raises(LeaseLost):
        beat(database, settings, held, Beat((NewEvent("from the grave"),), (saved(held, 20),)))
    with pytest.raises(LeaseLost):
        release(database, settings, held, ReleaseCause.FAULT)
    with database.writing() as session, pytest.raises(LeaseLost):
        ended.fail(session, held, JobError("x", "y"), published=published(held, Form.REPORTS))
    with database.writing() as session, pytest.raises(LeaseLost):
        ended.finish(session, held, published(held, *SUCCESS))
    after = now_of(database, job)
    assert (after.state, after.fence, after.losses) == (before.state, before.fence, before.losses)
    with database.reading() as session:
        assert session.scalars(select(Checkpoint)).all() == []
        assert session.scalars(select(Model)).all() == []
        assert jobs.list_artifacts(session, project.id, job.id) == []
        assert "from the grave" not in [
            event.message for event in jobs.list_events(session, project.id, job.id, Page()).rows
        ]


def test_a_fault_counts_rests_and_fails_the_third_time(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    slow = settings.model_copy(update={"lease": settings.lease.model_copy(update={"backoff_seconds": 30.0})})
    job = add_job(database, project, settings)
    for losses in (1, 2):
        assert release(database, slow, claimed(database, settings, job), ReleaseCause.FAULT) == ()
        found = now_of(database, job)
        assert (found.state, found.losses, found.woken_at) == ("queued", losses, None)
        assert claim(database, settings, job) is None
        with database.writing() as session:
            assert found.run_after - read_clock(session) == pytest.approx(30 * 2**losses, abs=20)
            session.execute(update(Job).where(Job.id == job.id).values(run_after=0.0))
            session.commit()
    release(database, slow, claimed(database, settings, job), ReleaseCause.FAULT)
    found = now_of(database, job)
    assert (found.state, (found.error or {})["code"]) == ("failed", "worker_crashed")


def test_a_checkpoint_forgives_losses(database: Database, settings: Settings, project: Project, base: BaseRow) -> None:
    job = add_job(database, project, settings)
    for step in (20, 40, 60, 80):
        with database.writing() as session:
            session.execute(update(Job).where(Job.id == job.id).values(run_after=0.0))
            session.commit()
        held = claimed(database, settings, job)
        beat(database, settings, held, Beat(checkpoints=(saved(held, step),)))
        release(database, settings, held, ReleaseCause.FAULT)
    assert (now_of(database, job).state, now_of(database, job).losses) == ("queued", 1)


def test_a_full_disk_rests_without_counting(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings)
    release(database, settings, claimed(database, settings, job), ReleaseCause.STORAGE)
    found = now_of(database, job)
    assert (found.state, found.losses) == ("queued", 0)
    assert claim(database, settings, job) is None


def test_success_is_downloadable_and_servable_at_once(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job, waiting = add_job(database, project, settings, suffix="support"), add_job(database, project, settings)
    held = claimed(database, settings, job)
    with database.writing() as session:
        wakes = ended.finish(session, held, published(held, *SUCCESS))
        session.commit()
    found = now_of(database, job)
    assert (found.state, found.stage, found.trained_tokens, found.lease_until) == ("succeeded", "done", 1234, None)
    assert found.fine_tuned_model == f"ft:tiny:local:support:{job.id[-8:]}"
    assert (found.result or {})["prefix"] == f"{held.prefix}/result"
    assert wakes == (Wake("immunotune.run_job", waiting.id, "train.cpu"),)
    with database.reading() as session:
        assert {result.artifact.form for result in jobs.list_artifacts(session, project.id, job.id)} == set(SUCCESS)
        assert session.scalars(select(Model.id)).one() == found.fine_tuned_model


def test_a_result_without_its_adapter_is_no_success(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings)
    held = claimed(database, settings, job)
    with database.writing() as session, pytest.raises(ValueError, match="adapter"):
        ended.finish(session, held, published(held, Form.METRICS, Form.REPORTS))
    assert now_of(database, job).state == "running"


def test_a_refused_result_keeps_its_reports_and_never_becomes_a_model(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings)
    held = claimed(database, settings, job)
    error = JobError("safety_gate_failed", "harmful_score 0.21 is not <= 0.1", "safety.gate.max_harmful_score")
    with database.writing() as session:
        ended.fail(session, held, error, published=published(held, *SUCCESS), quarantine=True)
        session.commit()
    found = now_of(database, job)
    assert (found.state, (found.error or {})["code"], found.fine_tuned_model) == ("failed", "safety_gate_failed", None)
    with database.reading() as session:
        held_back = {
            r.artifact.form for r in jobs.list_artifacts(session, project.id, job.id) if r.artifact.quarantined
        }
        assert session.scalars(select(Model)).all() == []
    assert held_back == {Form.ADAPTER, Form.ADAPTER_STOCK}


def test_a_claim_of_an_unknown_job_is_none(database: Database, settings: Settings, project: Project) -> None:
    with database.writing() as session:
        assert lease.claim(session, settings, "ftjob-absent", "w") is None
        with pytest.raises(NotFound):
            jobs.get_job(session, project.id, "ftjob-absent")


def test_the_same_news_twice_are_stored_once(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S19: the commit was done and its answer lost, so the same beat comes again."""
    job = add_job(database, project, settings)
    held = claimed(database, settings, job)
    news = Beat((NewEvent("one"), NewEvent("one")), (saved(held, 20), saved(held, 40)), "train", {"step": 40})
    for _ in range(3):
        beat(database, settings, held, news)
    with database.reading() as session:
        steps = [row.step for row in jobs.list_checkpoints(session, project.id, job.id, Page()).rows]
        messages = [event.message for event in jobs.list_events(session, project.id, job.id, Page()).rows]
    assert (steps, messages.count("one")) == ([40, 20], 2)


def test_an_attempt_from_before_a_restored_backup_holds_nothing(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S29: the number of its lease is given out again, to somebody else."""
    job = add_job(database, project, settings)
    before = claimed(database, settings, job)
    with database.writing() as session:
        backup = {"state": "queued", "fence": 0, "attempt": None, "lease_until": None, "worker_id": None}
        session.execute(update(Job).where(Job.id == job.id).values(backup))
        session.commit()
    after = claimed(database, settings, job)
    assert after.fence == before.fence
    assert after.prefix != before.prefix
    with pytest.raises(LeaseLost):
        beat(database, settings, before)
    with pytest.raises(LeaseLost):
        release(database, settings, before, ReleaseCause.DRAIN)
    beat(database, settings, after)


def test_a_rotten_checkpoint_is_passed_over_by_its_holder_alone(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S10: a fenced update with an event, no loss; the next older one, then none."""
    job = add_job(database, project, settings)
    first = claimed(database, settings, job)
    beat(database, settings, first, Beat(checkpoints=(saved(first, 20), saved(first, 40))))
    release(database, settings, first, ReleaseCause.DRAIN)
    second = claimed(database, settings, job)
    with database.writing() as session, pytest.raises(LeaseLost):
        lease.discard_checkpoint(session, replace(first, checkpoint=saved(first, 40)), reason="it was altered")
    with database.writing() as session:
        older = lease.discard_checkpoint(session, second, reason="it was altered")
        session.commit()
    assert older.checkpoint == saved(first, 20)
    release(database, settings, older, ReleaseCause.DRAIN)
    third = claimed(database, settings, job)
    assert third.checkpoint == saved(first, 20)
    with database.writing() as session:
        none = lease.discard_checkpoint(session, third, reason="it was altered")
        session.commit()
    assert none.checkpoint is None
    assert (now_of(database, job).losses, now_of(database, job).host_losses) == (0, 0)


def test_a_cancelled_job_lets_the_projects_next_one_run(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """Small: a cancel woke nobody, so the next job waited for the reaper."""
    running, waiting = add_job(database, project, settings), add_job(database, project, settings)
    claimed(database, settings, running)
    for expected in ((Wake("immunotune.run_job", waiting.id, "train.cpu"),), ()):
        with database.writing() as session:
            job, wakes = ended.cancel(session, project.id, running.id)
            session.commit()
        assert (job.state, wakes) == ("cancelled", expected)  # a repeat frees nothing


def test_a_claim_lets_pass_what_only_points_at_the_project(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """Review: a cancel held the job and waited for the project, a claim the other way round: a deadlock on Postgres."""
    job = add_job(database, project, settings, queued=True)
    points_at = select(Project.seq).where(Project.id == project.id)
    points_at = points_at.with_for_update(read=True, key_share=True, nowait=True)
    with database.writing() as claiming, database.reading() as other:
        assert lease.claim(claiming, settings, job.id, "worker_one") is not None
        assert other.scalars(points_at).one()  # what a foreign key asks for

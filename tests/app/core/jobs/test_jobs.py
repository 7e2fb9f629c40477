from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update

from app.core.broker import Wake
from app.core.errors import Forbidden, ImmunotuneError, InvalidRequest, NotFound, QuotaExceeded
from app.core.jobs import ended, jobs, lease
from app.core.jobs.jobs import JobError, NewEvent
from app.core.jobs.policy import CreateJob, get_policy, resolve_recipe
from app.core.settings import Settings
from app.core.storage.database import Database, Page
from app.core.storage.job_states import FINAL, JobState
from app.core.storage.tables import BaseRow, BaseStatus, File, FileStatus, Form, Job, Project
from finetuning.contract.recipe import Recipe
from tests.support.jobs import SUCCESS, add_file, add_job, published

ALL = Page(limit=100)


def refused(database: Database, settings: Settings, project: Project, **wishes: object) -> ImmunotuneError:
    request = CreateJob.model_validate({"model": "tiny", **wishes})
    with database.writing() as session, pytest.raises(ImmunotuneError) as caught:
        jobs.add_job(session, settings, project, request)
    return caught.value


def story(database: Database, project: Project, job: Job) -> list[str]:
    with database.reading() as session:
        return [event.message for event in jobs.list_events(session, project.id, job.id, ALL).rows[::-1]]


def test_a_new_job_holds_its_request_and_a_complete_recipe(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings, queued=False, suffix="support", seed=7, metadata={"team": "cx"})
    assert (job.state, job.stage, job.policy, job.queue) == ("validating_files", "validate", "immunotune", "train.cpu")
    assert CreateJob.model_validate(job.request).hyperparameters.n_epochs == "auto"
    assert Recipe.model_validate(job.recipe).seed == 7
    assert (job.metadata_, job.suffix) == ({"team": "cx"}, "support")
    assert jobs.wake_for(job) == Wake("immunotune.check_job", job.id, "checks")
    assert story(database, project, job) == [f"Created fine-tuning job: {job.id}"]


def test_the_checked_recipe_replaces_the_first_guess(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings, queued=False)
    recipe = resolve_recipe(get_policy("immunotune"), "tiny", CreateJob(model="tiny", training_file="f"), rows=37)
    with database.writing() as session:
        wakes = jobs.pass_checks(session, job.id, recipe)
        assert jobs.pass_checks(session, job.id, recipe) == ()
        session.commit()
        found = jobs.get_job(session, project.id, job.id)
    assert (found.state, found.stage, Recipe.model_validate(found.recipe)) == ("queued", "wait", recipe)
    assert wakes == (Wake("immunotune.run_job", job.id, "train.cpu"),)


def test_a_checked_job_waits_for_its_base(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    with database.writing() as session:
        session.execute(update(BaseRow).values(status=BaseStatus.ALIGNING))
        session.commit()
    job = add_job(database, project, settings, queued=False)
    with database.writing() as session:
        assert jobs.pass_checks(session, job.id, Recipe.model_validate(job.recipe)) == ()
        session.commit()
    assert story(database, project, job)[-1] == "Waiting until the base tiny is aligned"


def test_a_failed_check_ends_the_job_with_its_error(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings, queued=False)
    error = JobError(
        "invalid_training_file", "2 invalid rows. First: line 7: ...", "training_file", {"errors_total": 2}
    )
    with database.writing() as session:
        assert jobs.fail_checks(session, job.id, error)
        assert not jobs.fail_checks(session, job.id, error)
        session.commit()
        found = jobs.get_job(session, project.id, job.id)
    assert found.state == "failed"
    assert found.finished_at is not None
    assert found.error == {
        "code": "invalid_training_file",
        "message": "2 invalid rows. First: line 7: ...",
        "param": "training_file",
        "details": {"errors_total": 2},
    }


@pytest.mark.parametrize(
    ("wishes", "code", "param"),
    [
        ({"model": "unknown"}, "model_not_found", "model"),
        ({"model": "../../base"}, "model_not_found", "model"),
        ({"model": "ft:tiny:local::abcdefgh"}, "model_not_fine_tunable", "model"),
        ({"suffix": "a:b"}, "invalid_suffix", "suffix"),
        ({"suffix": "../x"}, "invalid_suffix", "suffix"),
        ({"suffix": "a\n"}, "invalid_suffix", "suffix"),
        ({"suffix": "x" * 65}, "invalid_suffix", "suffix"),
        ({"suffix": "ckpt-step-1"}, "invalid_suffix", "suffix"),
        ({"training_file": "file-absent"}, "invalid_training_file", "training_file"),
        ({"validation_file": "file-absent"}, "invalid_validation_file", "validation_file"),
        ({"safety": {"gate": {"max_harmful_score": 1.0}}}, "safety_policy_violation", "safety.gate.max_harmful_score"),
    ],
)
def test_a_bad_request_makes_no_job(
    database: Database,
    settings: Settings,
    project: Project,
    base: BaseRow,
    wishes: dict[str, object],
    code: str,
    param: str,
) -> None:
    file = add_file(database, project, settings)
    error = refused(database, settings, project, **({"training_file": file.id} | wishes))
    assert (error.status, error.code, error.param) == (400, code, param)
    with database.reading() as session:
        assert jobs.list_jobs(session, project.id, ALL).rows == []


def test_a_foreign_file_is_as_absent_as_an_absent_one(
    database: Database, settings: Settings, project: Project, baseline: Project, base: BaseRow
) -> None:
    foreign = add_file(database, baseline, settings)
    absent = foreign.id[:-1] + ("a" if foreign.id[-1] != "a" else "b")
    first = refused(database, settings, project, training_file=foreign.id)
    second = refused(database, settings, project, training_file=absent)
    assert first.message.replace(foreign.id, "") == second.message.replace(absent, "")
    assert (first.code, first.param) == (second.code, second.param)


def test_too_few_rows_are_refused_with_both_numbers(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    file = add_file(database, project, settings, rows=9)
    error = refused(database, settings, project, training_file=file.id)
    assert error.code == "invalid_n_examples"
    assert error.message == "Training file has 9 examples, but must have at least 10."


def test_a_file_with_bad_rows_is_refused_with_its_lines(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    errors = [{"line": 7, "code": "invalid_json", "message": "..."}]
    file = add_file(database, project, settings, status=FileStatus.ERROR, errors_total=1, errors=errors)
    error = refused(database, settings, project, training_file=file.id)
    assert error.code == "invalid_training_file"
    assert error.details is not None
    assert error.details["errors"] == errors


def test_a_file_that_an_older_release_left_unchecked_is_refused(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    file = add_file(database, project, settings)
    with database.writing() as session:
        session.execute(update(File).where(File.id == file.id).values(status="uploaded", validation=None))
        session.commit()
    assert refused(database, settings, project, training_file=file.id).code == "invalid_training_file"


def test_preference_pairs_do_not_train_a_supervised_job(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    file = add_file(database, project, settings, format="dpo")
    error = refused(database, settings, project, training_file=file.id)
    assert (error.code, error.param) == ("format_method_mismatch", "training_file")


def test_a_project_may_queue_only_so_many(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    few = settings.model_copy(update={"limits": settings.limits.model_copy(update={"live_jobs": 2})})
    first = add_job(database, project, few)
    add_job(database, project, few)
    file = add_file(database, project, few)
    assert isinstance(refused(database, few, project, training_file=file.id), QuotaExceeded)
    with database.writing() as session:
        jobs.cancel(session, project.id, first.id)
        session.commit()
    add_job(database, project, few)


def test_cancel_ends_any_live_job_at_once_and_can_be_repeated(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    checking = add_job(database, project, settings, queued=False)
    queued = add_job(database, project, settings)
    running = add_job(database, project, settings)
    with database.writing() as session:
        held = lease.claim(session, settings, running.id, "w")
        assert held is not None
        for job in (checking, queued, running):
            cancelled = jobs.cancel(session, project.id, job.id)
            assert (cancelled.state, cancelled.lease_until) == (JobState.CANCELLED, None)
            assert cancelled.finished_at is not None
        assert jobs.cancel(session, project.id, running.id).fence == held.fence + 1
        session.commit()
    assert story(database, project, running).count("Fine-tuning job cancelled") == 1


def test_a_finished_job_cannot_be_cancelled(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings, queued=False)
    with database.writing() as session:
        jobs.fail_checks(session, job.id, JobError("x", "y"))
        with pytest.raises(InvalidRequest) as caught:
            jobs.cancel(session, project.id, job.id)
    assert caught.value.code == "invalid_job_state"


def test_of_two_cancels_and_a_finish_at_once_exactly_one_ends_the_job(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings)
    with database.writing() as session:
        held = lease.claim(session, settings, job.id, "w")
        session.commit()
    assert held is not None

    def end(way: str) -> bool:
        with database.writing() as session:
            try:
                if way == "finish":
                    ended.finish(session, held, published(held, *SUCCESS))
                else:
                    jobs.cancel(session, project.id, job.id)
            except (ImmunotuneError, lease.LeaseLost):
                return False
            session.commit()
            return True

    with ThreadPoolExecutor(3) as pool:
        won = list(pool.map(end, ["cancel", "finish", "cancel"]))
    with database.reading() as session:
        state = jobs.get_job(session, project.id, job.id).state
    assert state in FINAL
    assert won[1] == (state == JobState.SUCCEEDED)
    endings = [m for m in story(database, project, job) if "cancelled" in m or "completed" in m]
    assert len(endings) == 1


def test_everything_of_a_foreign_job_is_not_found(
    database: Database, settings: Settings, project: Project, baseline: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings)
    with database.writing() as session:
        for read in (jobs.get_job, jobs.cancel, jobs.list_artifacts):
            with pytest.raises(NotFound):
                read(session, baseline.id, job.id)
        for listing in (jobs.list_events, jobs.list_checkpoints):
            with pytest.raises(NotFound):
                listing(session, baseline.id, job.id, ALL)
        assert jobs.list_jobs(session, baseline.id, ALL).rows == []
        with pytest.raises(InvalidRequest, match="cursor"):
            jobs.list_jobs(session, baseline.id, Page(after=job.id))


def test_jobs_are_found_by_metadata(database: Database, settings: Settings, project: Project, base: BaseRow) -> None:
    both = add_job(database, project, settings, metadata={"team": "cx", 'odd "key".$[0]': "va'lue"})
    one = add_job(database, project, settings, metadata={"team": "cx"})
    none = add_job(database, project, settings)

    def ids(**filters: object) -> list[str]:
        with database.reading() as session:
            return [job.id for job in jobs.list_jobs(session, project.id, ALL, **filters).rows]  # type: ignore[arg-type]

    assert ids(metadata={"team": "cx"}) == [one.id, both.id]
    assert ids(metadata={"team": "cx", 'odd "key".$[0]': "va'lue"}) == [both.id]
    assert ids(metadata={"team": "other"}) == []
    assert ids(no_metadata=True) == [none.id]


def test_events_keep_their_order(database: Database, settings: Settings, project: Project, base: BaseRow) -> None:
    job = add_job(database, project, settings, queued=False)
    with database.writing() as session:
        jobs.append_events(session, job.id, [NewEvent(f"event {number}") for number in range(30)])
        session.commit()
    assert story(database, project, job)[1:] == [f"event {number}" for number in range(30)]


def test_the_csv_comes_first_and_quarantined_weights_cannot_be_had(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings)
    with database.writing() as session:
        held = lease.claim(session, settings, job.id, "w")
        assert held is not None
        result = published(held, Form.ADAPTER, Form.REPORTS, Form.MASK, Form.METRICS)
        ended.fail(session, held, JobError("safety_gate_failed", "..."), published=result, quarantine=True)
        session.commit()
    with database.reading() as session:
        assert jobs.list_artifacts(session, project.id, job.id)[0].artifact.form == Form.METRICS
        assert jobs.get_artifact(session, project.id, job.id, Form.REPORTS).file.size_bytes > 0
        assert jobs.get_artifact(session, project.id, job.id, Form.MASK).file.purpose == "fine-tune-results"
        with pytest.raises(Forbidden) as held_back:
            jobs.get_artifact(session, project.id, job.id, Form.ADAPTER)
        with pytest.raises(InvalidRequest) as absent:
            jobs.get_artifact(session, project.id, job.id, Form.ADAPTER_STOCK)
    assert (held_back.value.code, absent.value.code) == ("artifact_quarantined", "artifact_form_unavailable")

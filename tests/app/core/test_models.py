from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.core import files, models
from app.core.errors import Forbidden, InvalidRequest, NotFound, ServiceBusy
from app.core.jobs import ended, jobs, lease, waiting
from app.core.jobs.jobs import JobError
from app.core.jobs.policy import CreateJob
from app.core.settings import Settings
from app.core.storage.database import Database, Page
from app.core.storage.tables import BaseRow, Form, Job, Project
from tests.support.jobs import SUCCESS, add_file, add_job, published


@pytest.fixture
def tuned(database: Database, settings: Settings, project: Project, base: BaseRow) -> Job:
    """A succeeded job with its model."""
    job = add_job(database, project, settings, suffix="support")
    with database.writing() as session:
        held = lease.claim(session, settings, job.id, "w")
        assert held is not None
        ended.finish(session, held, published(held, *SUCCESS))
        session.commit()
        return jobs.get_job(session, project.id, job.id)


def name_of(job: Job) -> str:
    assert job.fine_tuned_model is not None
    return job.fine_tuned_model


def test_a_base_is_aligned_once(database: Database, settings: Settings) -> None:
    with database.writing() as session:
        (due,) = models.ensure_base(session, settings)
        assert models.ensure_base(session, settings) == ()
        session.commit()
    with database.reading() as session:
        align = models.get_alignment(session, "tiny")
        assert align is not None
        assert (align.id, align.kind, align.state) == (due.id, "align", "queued")
        assert models.get_base(session, "tiny").status == "aligning"


def test_a_start_says_what_context_the_base_has(database: Database, settings: Settings) -> None:
    with database.writing() as session:
        models.ensure_base(session, settings)
        models.get_base(session, "tiny").context = 256  # as an earlier release stored it
        session.commit()
    with database.writing() as session:
        models.ensure_base(session, settings)
        session.commit()
    with database.reading() as session:
        assert models.get_base(session, "tiny").context == 512


def test_a_failed_alignment_is_tried_again_at_the_next_start(database: Database, settings: Settings) -> None:
    with database.writing() as session:
        (first,) = models.ensure_base(session, settings)
        held = lease.claim(session, settings, first.id, "w")
        assert held is not None
        ended.fail(session, held, JobError("non_finite_loss", "..."))
        session.commit()
    with database.writing() as session:
        assert models.get_base(session, "tiny").status == "failed"
        (second,) = models.ensure_base(session, settings)
        session.commit()
    assert second.id != first.id
    with database.reading() as session:
        assert models.get_base(session, "tiny").status == "aligning"


def test_a_failed_alignment_lets_jobs_wait_and_refuses_what_comes(
    database: Database, settings: Settings, project: Project
) -> None:
    """S9: jobs wait for the operator's next start, which aligns the base again; new ones are told."""
    with database.writing() as session:
        (due,) = models.ensure_base(session, settings)
        session.commit()
    made = [add_job(database, project, settings, queued=queued) for queued in (True, False)]
    with database.writing() as session:
        held = lease.claim(session, settings, due.id, "w")
        assert held is not None
        ended.fail(session, held, JobError("non_finite_loss", "..."))
        session.commit()
    with database.reading() as session:
        for job in made:
            assert jobs.get_job(session, project.id, job.id).state == job.state
            assert "failed" in newest_event(session, project, job)
        assert waiting.count_baseless(session) == 2
        with pytest.raises(ServiceBusy) as busy:
            models.resolve(session, project.id, "tiny")
    assert "failed" in busy.value.message
    assert "being aligned" not in busy.value.message
    with pytest.raises(InvalidRequest) as refused:
        add_job(database, project, settings)
    assert (refused.value.code, refused.value.message) == ("model_not_fine_tunable", busy.value.message)
    with database.writing() as session:
        (again,) = models.ensure_base(session, settings)
        held = lease.claim(session, settings, again.id, "w")
        assert held is not None
        ended.finish(session, held, published(held, Form.ALIGNMENT))
        assert lease.claim(session, settings, made[0].id, "w") is not None
        assert waiting.count_baseless(session) == 0


def newest_event(session: Session, project: Project, job: Job) -> str:
    return jobs.list_events(session, project.id, job.id, Page(limit=1)).rows[0].message


def test_a_process_with_another_base_does_not_start_and_ends_no_job(
    database: Database, settings: Settings, project: Project, tuned: Job
) -> None:
    """S9: one wrong IMMUNOTUNE_BASE retires nothing, the queued job stays, and the refusal names the verb."""
    other = settings.model_copy(update={"base": "smollm2"})
    queued = add_job(database, project, settings)
    for start in (models.ensure_base, models.require_base):
        with database.writing() as session, pytest.raises(models.OtherBase, match="immunotune retire tiny"):
            start(session, other)
    with database.reading() as session:
        assert models.resolve(session, project.id, name_of(tuned)).base_id == "tiny"
        assert jobs.get_job(session, project.id, queued.id).state == "queued"
        models.require_base(session, settings)


def test_a_retired_base_gives_way_and_its_jobs_wait_until_it_is_served_again(
    database: Database, settings: Settings, project: Project, tuned: Job
) -> None:
    """S9: jobs of the retired base wait, with an event and in the gauge, and go on when it is served again."""
    other = settings.model_copy(update={"base": "smollm2"})
    queued = add_job(database, project, settings)
    with database.writing() as session:
        assert models.retire_base(session, "tiny") == 1
        assert models.retire_base(session, "tiny") == 0
        (due,) = models.ensure_base(session, other)
        session.commit()
    with database.reading() as session:
        names = [item.id for item in models.list_models(session, project.id)]
        assert names == ["smollm2-135m-instruct", "tiny", name_of(tuned)]
        for name in names[1:]:
            with pytest.raises(NotFound) as gone:
                models.resolve(session, project.id, name)
            assert "no longer served" in gone.value.message
        assert jobs.get_job(session, project.id, queued.id).state == "queued"
        assert "waits for its base" in newest_event(session, project, queued)
        assert waiting.count_baseless(session) == 1
        assert REGISTRY.get_sample_value("immunotune_jobs_without_base") == 1
    with pytest.raises(InvalidRequest) as refused:
        add_job(database, project, settings)
    assert refused.value.code == "model_not_fine_tunable"
    with database.writing() as session:
        models.retire_base(session, "smollm2-135m-instruct")
        assert models.ensure_base(session, settings) == ()
        assert lease.claim(session, settings, due.id, "w") is None
        assert models.resolve(session, project.id, name_of(tuned)).base_id == "tiny"
        assert lease.claim(session, settings, queued.id, "w") is not None
        models.retire_others(session, other)
        assert models.ensure_base(session, other) == (due,)


def test_the_operators_policy_decides_how_the_base_is_aligned(
    database: Database, settings: Settings, project: Project, baseline: Project, base: BaseRow
) -> None:
    """Jobs of a policy whose alignment is not there are told what to do; after a start with it they wait for it."""
    asked = settings.model_copy(update={"policy": "as_asked"})
    with database.writing() as session:
        session.execute(update(Project).where(Project.id == project.id).values(policy="as_asked"))
        session.commit()
    with database.reading() as session:
        project = session.scalars(select(Project).where(Project.id == project.id)).one()
    with pytest.raises(InvalidRequest) as refused:
        add_request(database, settings, project)
    assert refused.value.code == "model_not_fine_tunable"
    assert "aligned by 'vaccine_all'" in refused.value.message
    assert "IMMUNOTUNE_POLICY=as_asked" in refused.value.message
    with database.writing() as session:
        (due,) = models.ensure_base(session, asked)
        assert models.ensure_base(session, asked) == ()
        session.commit()
        align = models.get_alignment(session, "tiny")
        assert align is not None
        assert (align.id, align.recipe["name"], align.recipe["vaccine"]["every"]) == (due.id, "vaccine_all", 1)
        assert models.get_base(session, "tiny").status == "aligning"
    job, plain = (add_request(database, asked, of) for of in (project, baseline))
    with database.writing() as session:
        held = lease.claim(session, asked, due.id, "w")
        assert held is not None
        ended.finish(session, held, published(held, Form.ALIGNMENT))
        session.commit()
        assert models.ensure_base(session, asked) == ()
        assert models.get_base(session, "tiny").status == "ready"
    assert (job.policy, job.recipe["antibody"]["score"], plain.policy) == ("as_asked", "current", "plain")


def add_request(database: Database, settings: Settings, project: Project) -> Job:
    """A job as a request to the API makes it: the policy is the project's."""
    file = add_file(database, project, settings)
    with database.writing() as session:
        job = jobs.add_job(session, settings, project, CreateJob(model="tiny", training_file=file.id))
        session.commit()
        return job


def test_one_base_id_is_one_source(database: Database, settings: Settings, tmp_path: Path) -> None:
    def serve(base: str) -> None:
        with database.writing() as session:
            if base.startswith("smollm2"):
                models.retire_others(session, settings.model_copy(update={"base": base}))
            models.ensure_base(session, settings.model_copy(update={"base": base}))
            session.commit()

    (tmp_path / "one" / "llama").mkdir(parents=True)
    serve(str(tmp_path / "one" / "llama"))
    serve(str(tmp_path / "one" / "llama") + "/")
    with pytest.raises(models.BaseTaken, match="acme/llama"):
        serve("acme/llama")
    serve("smollm2")
    serve("smollm2-135m-instruct")


def test_align_jobs_are_nobodys(database: Database, settings: Settings, project: Project, base: BaseRow) -> None:
    with database.reading() as session:
        align = session.scalars(select(Job).where(Job.kind == "align")).one()
        with pytest.raises(NotFound):
            jobs.get_job(session, project.id, align.id)


def test_a_base_answers_once_it_is_ready(database: Database, settings: Settings, project: Project) -> None:
    with database.writing() as session:
        (due,) = models.ensure_base(session, settings)
        with pytest.raises(ServiceBusy) as caught:
            models.resolve(session, project.id, "tiny")
        assert (caught.value.status, caught.value.code) == (503, "model_loading")
        assert caught.value.retry_after is not None
        held = lease.claim(session, settings, due.id, "w")
        assert held is not None
        result = published(held, Form.ALIGNMENT)
        ended.finish(session, held, result)
        session.commit()
    with database.reading() as session:
        target = models.resolve(session, project.id, "tiny")
    assert (target.base_id, target.adapter) == ("tiny", result.files[0].blob)


def test_a_model_resolves_to_its_adapter_for_its_project_alone(
    database: Database, project: Project, baseline: Project, tuned: Job
) -> None:
    with database.reading() as session:
        target = models.resolve(session, project.id, name_of(tuned))
        stock = jobs.get_artifact(session, project.id, tuned.id, Form.ADAPTER_STOCK).file
        with pytest.raises(NotFound) as foreign:
            models.resolve(session, baseline.id, name_of(tuned))
    assert (target.base_id, target.adapter) == ("tiny", files.blob_of(stock))
    assert target.served == f"{stock.blob_key}@{stock.sha256}:{stock.size_bytes}"
    assert foreign.value.code == "model_not_found"


def test_models_are_listed_after_the_bases_for_their_project_alone(
    database: Database, project: Project, baseline: Project, tuned: Job
) -> None:
    with database.reading() as session:
        assert [model.id for model in models.list_models(session, project.id)] == ["tiny", name_of(tuned)]
        assert [model.id for model in models.list_models(session, baseline.id)] == ["tiny"]


def test_a_deleted_model_is_gone_and_its_artifacts_stay(
    database: Database, settings: Settings, project: Project, tuned: Job
) -> None:
    with database.writing() as session:
        models.delete_model(session, project.id, name_of(tuned))
        session.commit()
    with database.writing() as session:
        for ask in (models.resolve, models.get_model, models.delete_model):
            with pytest.raises(NotFound):
                ask(session, project.id, name_of(tuned))
        assert jobs.get_artifact(session, project.id, tuned.id, Form.ADAPTER).file.size_bytes > 0


def test_a_base_cannot_be_deleted(database: Database, project: Project, base: BaseRow) -> None:
    with database.writing() as session, pytest.raises(Forbidden) as caught:
        models.delete_model(session, project.id, base.id)
    assert caught.value.code == "model_protected"


@pytest.mark.parametrize("name", ["", "nothing", "../../base", "/etc", "ft:tiny:local:support:aaaaaaaa", "art_x"])
def test_unknown_names_are_not_found(database: Database, project: Project, base: BaseRow, name: str) -> None:
    with database.reading() as session, pytest.raises(NotFound) as caught:
        models.resolve(session, project.id, name)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("name", "base_id"),
    [("smollm2", "smollm2-135m-instruct"), ("tiny", "tiny"), ("acme/Big_Model-7B", "big_model-7b"), ("/a/b c/", "b-c")],
)
def test_base_ids_come_from_names(name: str, base_id: str) -> None:
    assert models.base_id_of(name) == base_id

"""Releases side by side: a worker takes only jobs whose recipe has a form that it knows, and reads those leniently."""

from sqlalchemy import update

from app.core.jobs import jobs, lease
from app.core.settings import Settings
from app.core.storage.database import Database
from app.core.storage.job_states import JobState
from app.core.storage.tables import BaseRow, Job, Project
from finetuning.contract.recipe import RECIPE_VERSION, Recipe
from tests.support.jobs import add_job

WORKER = "worker_of_this_release"


def _rewritten(database: Database, job: Job, **fields: object) -> dict[str, object]:
    """The job's recipe as a newer release stores it, with fields that this one does not know."""
    recipe = {**job.recipe, "echo": {"depth": 3}, "lora": {**job.recipe["lora"], "shape": "round"}, **fields}  # type: ignore[dict-item]
    values: dict[str, object] = {"recipe": recipe}
    if "schema_version" in fields:
        values["recipe_version"] = fields["schema_version"]
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == job.id).values(values))
        session.commit()
    return recipe


def _claim(database: Database, settings: Settings, job: Job) -> lease.Lease | None:
    with database.writing() as session:
        held = lease.claim(session, settings, job.id, WORKER)
        session.commit()
    return held


def test_a_recipe_with_fields_that_are_new_is_claimed(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S7: an older worker's claim raised ValidationError for ever."""
    job = add_job(database, project, settings)
    _rewritten(database, job)
    held = _claim(database, settings, job)
    assert held is not None
    assert held.recipe == Recipe.model_validate(job.recipe)


def test_a_recipe_of_a_newer_form_is_left_to_newer_workers(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S7: it stays queued, unharmed, until a worker comes that knows it."""
    job = add_job(database, project, settings)
    stored = _rewritten(database, job, schema_version=RECIPE_VERSION + 1, tuning_step="of_tomorrow")
    assert _claim(database, settings, job) is None
    with database.reading() as session:
        found = jobs.get_job(session, project.id, job.id)
    assert (found.state, found.losses, found.fence, found.recipe) == (JobState.QUEUED, 0, 0, stored)


def test_an_older_check_leaves_a_newer_recipe_as_it_is(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S7: a check writes the recipe anew, so an older one would drop what it does not know."""
    job = add_job(database, project, settings, queued=False)
    mine = Recipe.model_validate(job.recipe)
    stored = _rewritten(database, job, schema_version=RECIPE_VERSION + 1)
    with database.writing() as session:
        assert jobs.find_unchecked(session, job.id) is None
        assert jobs.pass_checks(session, job.id, mine) == ()
        session.commit()
        found = jobs.get_job(session, project.id, job.id)
        assert (found.state, found.recipe) == (JobState.VALIDATING, stored)


def test_every_job_says_the_form_of_its_recipe(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S7: fine-tunes and align jobs, before their check and after it."""
    add_job(database, project, settings, queued=False)
    add_job(database, project, settings)
    with database.reading() as session:
        found = session.query(Job).all()
    assert len(found) == 3
    assert all(job.recipe_version == job.recipe["schema_version"] == RECIPE_VERSION for job in found)

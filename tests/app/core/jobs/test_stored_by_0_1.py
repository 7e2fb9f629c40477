"""Facts about jobs that an earlier release stored: their recipes still run, their reports are still read and shown.

tests/support/stored_by_0_1 holds the JSON that release 0.1's service wrote for a job of the demo.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy import update

from app.api.schemas.results import report_to_body
from app.core.jobs import lease
from app.core.settings import Settings
from app.core.storage.database import Database
from app.core.storage.tables import BaseRow, Job, Project
from finetuning.contract.recipe import Recipe
from finetuning.contract.report import SafetyReport
from tests.support.jobs import add_job

STORED = Path(__file__).parents[3] / "support" / "stored_by_0_1"


def stored(name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((STORED / f"{name}.json").read_text(encoding="utf-8"))
    return found


def assert_holds(found: Mapping[str, object], earlier: Mapping[str, object]) -> None:
    """Every field of then has the value of then; a field that was added since switches nothing on."""
    for name, value in found.items():
        before = earlier.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            assert_holds(value, before)
        else:
            assert value == before or (name not in earlier and (value is None or name == "min_category_rows")), name
    assert earlier.keys() <= found.keys()


def test_a_recipe_keeps_every_field_and_its_number_of_steps() -> None:
    recipe = Recipe.model_validate(stored("recipe"))
    assert_holds(recipe.model_dump(mode="json"), stored("recipe"))
    assert recipe.steps == 72


def test_a_queued_job_is_claimed_with_its_recipe(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    job = add_job(database, project, settings)
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == job.id).values(recipe=stored("recipe")))
        session.commit()
        held = lease.claim(session, settings, job.id, "worker_new")
        session.commit()
    assert held is not None
    assert held.recipe == Recipe.model_validate(stored("recipe"))


def test_a_report_under_the_old_key_is_read_and_shown_as_before(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    old = stored("safety")
    digest = old["probe_sha256"]
    assert SafetyReport.model_validate(old).safety_rows_sha256 == digest
    assert "probe_sha256" not in SafetyReport.model_validate(old).model_dump()
    job = add_job(database, project, settings)
    job.result = {"safety": old}
    shown = report_to_body(job)
    assert isinstance(shown["probe_set"], dict)
    assert (shown["probe_set"]["id"], shown["probe_set"]["sha256"]) == ("gate", digest)

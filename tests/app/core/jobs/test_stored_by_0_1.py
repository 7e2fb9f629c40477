"""Facts about jobs that an earlier release stored: their recipes still run, their reports are still read and shown.

tests/support/stored_by_0_1 holds the JSON that release 0.1's service wrote for a job of the demo.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter
from sqlalchemy import update

from app.api.schemas.results import report_to_body, verdict_to_body
from app.core.jobs import lease
from app.core.settings import Settings
from app.core.storage.database import Database
from app.core.storage.tables import BaseRow, Job, Project
from finetuning.contract.progress import StepDone
from finetuning.contract.recipe import OptimiserSettings, Recipe
from finetuning.contract.report import RowVerdict, SafetyReport
from tests.support.jobs import add_job

STORED = Path(__file__).parents[3] / "support" / "stored_by_0_1"


# Reasons and figures that 0.1 called by Antibody's name, though the screen alone had weighed the rows.
OLD_REASON, OLD_WEIGHT = "antibody_low_weight", "antibody_mean_weight"

# 0.1 counted a job's warm-up in steps, ten in each; today it is a share of the steps.
OLD_WARM_UP = "warmup_steps"
# Numbers that only what was switched on since reads.
SINCE = ("min_category_rows", "mus", "warmup_share", "everyday_rows", "benign_kl", "schema_version")


def stored(name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((STORED / f"{name}.json").read_text(encoding="utf-8"))
    return found


def assert_holds(found: Mapping[str, object], earlier: Mapping[str, object]) -> None:
    """Every field of then has the value of then, but one that says it another way today; one that was added since
    switches nothing on."""
    for name, value in found.items():
        before = earlier.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            assert_holds(value, before)
        else:
            assert value == before or (name not in earlier and (value is None or name in SINCE)), name
    assert earlier.keys() - {OLD_WARM_UP} <= found.keys()


def test_a_recipe_keeps_every_field_and_its_number_of_steps() -> None:
    recipe = Recipe.model_validate(stored("recipe"))
    assert_holds(recipe.model_dump(mode="json"), stored("recipe"))
    assert recipe.steps == 72


def test_a_recipe_that_counts_its_warm_up_in_steps_warms_up_by_todays_share() -> None:
    old = stored("recipe")
    assert isinstance(old["optimiser"], dict)
    assert old["optimiser"][OLD_WARM_UP] == 10
    optimiser = Recipe.model_validate(old).optimiser
    assert optimiser == OptimiserSettings(learning_rate=1e-3)
    assert OLD_WARM_UP not in optimiser.model_dump()


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


def test_a_report_that_says_alpha_0_says_in_words_that_nothing_was_pruned(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    old = stored("safety")
    assert (old["alpha"], "pruning" in old) == (0.0, False)
    job = add_job(database, project, settings)
    job.result = {"safety": old}
    assert (report_to_body(job)["alpha"], report_to_body(job)["pruning"]) == (0.0, "not pruned")


def test_an_old_ledger_is_shown_with_the_screens_own_reason() -> None:
    text = (STORED / "rows.json").read_text(encoding="utf-8")
    assert text.count(OLD_REASON) == 2
    rows = TypeAdapter(list[RowVerdict]).validate_json(text)
    shown = [verdict_to_body(row) for row in rows]
    assert [row["reasons"] and row["reasons"][0]["code"] for row in shown] == [  # type: ignore[index]
        "screen_low_weight" if row.verdict == "excluded" else [] for row in rows
    ]
    assert [(row["line"], row["weight"]) for row in shown] == [(r["line"], r["weight"]) for r in json.loads(text)]


def test_steps_of_an_old_checkpoint_keep_their_figures() -> None:
    lines = (STORED / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [StepDone.model_validate_json(line) for line in lines]
    assert [step.mean_row_weight for step in steps] == [json.loads(line)[OLD_WEIGHT] for line in lines]
    assert all(OLD_WEIGHT not in step.model_dump_json() for step in steps)

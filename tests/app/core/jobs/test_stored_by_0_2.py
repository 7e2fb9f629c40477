"""Facts about what release 0.2 stored: whoever reads the shelf later reads all of it.

tests/support/stored_by_0_2 holds what its service wrote for an align job of the tiny base and a fine-tune over it: the
job rows, a checkpoint's row, contents and steps, the row ledger, and what lies beside the alignment.
"""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from sqlalchemy import update

from app.api.schemas.jobs import JobFrame, checkpoint_to_body, job_to_body
from app.api.schemas.results import parity_to_body, report_to_body, verdict_to_body
from app.core.jobs import jobs, lease
from app.core.settings import Settings
from app.core.storage.database import Database
from app.core.storage.job_states import JobState
from app.core.storage.tables import BaseRow, Checkpoint, Job, Project
from finetuning.contract.progress import StepDone
from finetuning.contract.recipe import RECIPE_VERSION, Recipe
from finetuning.contract.report import RowVerdict, SafetyReport
from finetuning.contract.shelf import from_shelf
from tests.support.jobs import add_job

STORED = Path(__file__).parents[3] / "support" / "stored_by_0_2"
# of the deployment that stored them
OWN = ("seq", "id", "project_id", "training_file", "validation_file", "created_at", "metadata")


def stored(name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((STORED / f"{name}.json").read_text(encoding="utf-8"))
    return found


def shelved(database: Database, project: Project, settings: Settings, name: str, **changes: object) -> Job:
    """A job of ours whose row has what was stored then."""
    job = add_job(database, project, settings)
    values = {key: value for key, value in stored(name).items() if key not in OWN} | changes
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == job.id).values(values))
        session.commit()
        return jobs.get_job(session, project.id, job.id)


@pytest.mark.parametrize("name", ["job", "align_job"])
def test_a_finished_job_is_shown_with_all_that_was_measured(
    database: Database, settings: Settings, project: Project, base: BaseRow, name: str
) -> None:
    """S7: job, report and certificate of then, by today's release."""
    job = shelved(database, project, settings, name)
    body = job_to_body(job, JobFrame("org"))
    assert (body["status"], body["seed"]) == ("succeeded", 0)
    assert body["safety"]["gate"]["decision"] == "pass"  # type: ignore[index]
    report = report_to_body(job)
    assert (report["complete"], report["readable"]) == (True, True)
    assert report["metrics"]
    certificate = parity_to_body(job)
    assert (certificate is None) == (name == "align_job")
    assert certificate is None or certificate["passed"] is True


def test_a_recipe_is_claimed_and_runs_unchanged(
    database: Database, settings: Settings, project: Project, base: BaseRow
) -> None:
    """S7: a job that waited during the upgrade, and its saved checkpoint."""
    waiting = {"state": JobState.QUEUED, "fence": 0, "lease_until": None, "worker_id": None, "result": None}
    job = shelved(database, project, settings, "job", **waiting, finished_at=None, fine_tuned_model=None)
    saved = {key: value for key, value in stored("checkpoint").items() if key not in ("seq", "id", "job_id")}
    with database.writing() as session:
        session.add(Checkpoint(id="ftckpt-stored", job_id=job.id, **saved))
        session.flush()
        held = lease.claim(session, settings, job.id, "worker_new")
        session.commit()
    assert held is not None
    assert held.checkpoint is not None
    then = stored("job")["recipe"]
    assert isinstance(then, dict)
    now = held.recipe.model_dump(mode="json")
    assert {name: now[name] for name in then} == then
    assert held.recipe.schema_version <= RECIPE_VERSION
    assert held.recipe == from_shelf(Recipe, then)


def test_a_checkpoint_is_shown_and_its_steps_are_read() -> None:
    """S7: a resumed job's CSV is whole across the upgrade."""
    body = checkpoint_to_body(Checkpoint(**stored("checkpoint")), "ft:tiny")
    assert body["step_number"] == stored("checkpoint")["step"]
    lines = (STORED / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    assert [StepDone.model_validate_json(line, extra="ignore").step for line in lines] == [1, 2, 3, 4, 5]


def test_a_ledger_is_shown() -> None:
    """S7: every row's verdict of then."""
    text = (STORED / "rows.json").read_text(encoding="utf-8")
    rows = TypeAdapter(list[RowVerdict]).validate_json(text, extra="ignore")
    assert [verdict_to_body(row)["verdict"] for row in rows] == [row["verdict"] for row in json.loads(text)]


def test_an_alignment_is_read_with_its_calibration(tmp_path: Path) -> None:
    """S7: bases are aligned once and served for long; a later release's extra field does no harm either."""
    from finetuning.stages.align import read_alignment  # torch: only for this test

    about, report = stored("base_alignment"), stored("base_safety")
    calibration = about["calibration"]
    assert isinstance(calibration, dict)
    for newer in ({}, {"echo": 1}):
        (tmp_path / "alignment.json").write_text(json.dumps({**about, "calibration": {**calibration, **newer}}))
        (tmp_path / "safety.json").write_text(json.dumps({**report, **newer}))
        found, read = read_alignment(tmp_path)
        assert found is not None
        assert found.threshold == calibration["threshold"]
        assert read == from_shelf(SafetyReport, report)

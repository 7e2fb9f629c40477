"""What another release stored, or nobody foresaw, breaks no list, no GET and no cancel: the shelf is read leniently."""

import json
from copy import deepcopy
from typing import Any

import pytest
from sqlalchemy import update

from app.core.storage.blobs import put_bytes
from app.core.storage.tables import Job, Project
from tests.support.http import Customer, publish

NEWER_RECIPE: dict[str, Any] = {"schema_version": 9, "echo": {"depth": 3}, "tuning_step": "of_tomorrow"}
ODD_ROWS: dict[str, dict[str, Any]] = {
    "a newer recipe": {"recipe": NEWER_RECIPE},
    "a newer part of a recipe": {"recipe": {"antidote": {"score": "of_tomorrow", "depth": 2}, "lora": {"shape": "x"}}},
    "a part that is no object": {"recipe": {"antibody": "off", "screen": None, "lora": [], "gate": 7}},
    "a policy that is gone": {"policy": "of_yesterday"},
    "a request without numbers": {"request": None},
    "a newer report": {"result": {"safety": {"schema_version": 9, "echo": 1}, "rows": "none", "prefix": "p"}},
    "a report that is no object": {"result": {"safety": "later", "parity": "later"}},
    "a newer certificate": {"result": {"parity": {"schema_version": 9, "echo": 1}}},
    "progress of another kind": {"progress": {"rows": [1], "step": "all"}},
}

# what a job may have before it has a result
LIVE_ROWS = {name: odd for name, odd in ODD_ROWS.items() if "result" not in odd}


def _overlaid(stored: Any, odd: Any) -> Any:
    """The stored value with the odd one over it, part by part."""
    if isinstance(stored, dict) and isinstance(odd, dict):
        return {**stored, **{name: _overlaid(stored.get(name), value) for name, value in odd.items()}}
    return odd


def _spoil(customer: Customer, job: Job, odd: dict[str, Any]) -> None:
    """Store these odd values over the job's own."""
    values = {name: _overlaid(deepcopy(getattr(job, name)), {} if value is None else value)
              for name, value in odd.items()}  # fmt: skip
    if odd.get("request", 0) is None:
        values["request"] = {}
    with customer.served.database.writing() as session:
        session.execute(update(Job).where(Job.id == job.id).values(values))
        session.commit()


def _done(customer: Customer) -> Job:
    job = customer.job()
    customer.succeed(job)
    with customer.served.database.reading() as session:
        found = session.get(Job, job.seq)
    assert found is not None
    return found


@pytest.mark.parametrize("odd", ODD_ROWS.values(), ids=list(ODD_ROWS))
def test_an_odd_row_breaks_no_list_and_no_get(customer: Customer, odd: dict[str, Any]) -> None:
    """S7: one newer row made `GET /fine_tuning/jobs` a 500 for the whole project."""
    job, sound = _done(customer), customer.job()
    _spoil(customer, job, odd)
    listed = customer.http.get("/fine_tuning/jobs")
    assert listed.status_code == 200, listed.text
    assert [item["id"] for item in listed.json()["data"]] == [sound.id, job.id]
    path = f"/fine_tuning/jobs/{job.id}"
    for tail in ("", "/safety", "/parity", "/artifacts", "/events", "/checkpoints"):
        found = customer.http.get(path + tail)
        assert found.status_code == 200, (tail, found.text)
    assert customer.http.get(path).json()["status"] == "succeeded"
    assert [found.id for found in customer.sdk.fine_tuning.jobs.list()] == [sound.id, job.id]


@pytest.mark.parametrize("odd", LIVE_ROWS.values(), ids=list(LIVE_ROWS))
def test_an_odd_row_can_be_cancelled(customer: Customer, odd: dict[str, Any]) -> None:
    """S7: the cancel of such a job was a 500, and rolled back."""
    job = customer.job()
    _spoil(customer, job, odd)
    cancelled = customer.http.post(f"/fine_tuning/jobs/{job.id}/cancel")
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert customer.http.get(f"/fine_tuning/jobs/{job.id}").json()["status"] == "cancelled"


def test_what_is_new_in_a_row_is_shown_as_it_stands(customer: Customer) -> None:
    """S7: a policy or a method that this release does not know is text, not an error and not a guess."""
    job = _done(customer)
    _spoil(customer, job, {"policy": "of_yesterday", "recipe": {"antidote": {"score": "of_tomorrow"}}})
    safety = customer.http.get(f"/fine_tuning/jobs/{job.id}").json()["safety"]
    assert (safety["policy"], safety["antidote"]["score"]) == ("of_yesterday", "of_tomorrow")
    assert customer.http.get(f"/fine_tuning/jobs/{job.id}/safety").json()["policy"] == "of_yesterday"


def test_a_report_with_a_newer_field_is_shown_whole(customer: Customer) -> None:
    """S7: what this release knows of a newer report, it shows."""
    job = _done(customer)
    before = customer.http.get(f"/fine_tuning/jobs/{job.id}/safety").json()
    _spoil(customer, job, {"result": {"safety": {"echo": 1, "gate": {"echo": 2}}, "parity": {"echo": 3}}})
    assert customer.http.get(f"/fine_tuning/jobs/{job.id}/safety").json() == before
    assert customer.http.get(f"/fine_tuning/jobs/{job.id}/parity").json()["passed"] is True


def test_a_report_that_cannot_be_read_says_so(customer: Customer) -> None:
    """S7: a report of a form that this release does not read is not shown as measured."""
    job = _done(customer)
    _spoil(customer, job, {"result": {"safety": {"metrics": [1, 2]}}})
    report = customer.http.get(f"/fine_tuning/jobs/{job.id}/safety").json()
    assert (report["complete"], report["readable"], report["metrics"]) == (False, False, {})
    assert report["gate"]["decision"] == "pass"


def test_a_ledger_with_newer_rows_is_read(customer: Customer) -> None:
    """S7: a reason that a later screen gives, and a field beside it, are shown as they stand."""
    job = customer.job()
    held = customer.claim(job)
    publish(customer.served.blobs, held, passed=True)
    row = {
        "line": 7, "row_sha256": "e3" * 32, "verdict": "set_aside", "weight": 0.5, "tokens": 1, "trained_tokens": 1,
        "reasons": [{"code": "echo", "score": 1.0, "depth": 2}], "echo": True,
    }  # fmt: skip
    prefix = f"{held.prefix}/later"
    put_bytes(customer.served.blobs, f"{prefix}/reports/rows.json", json.dumps([row]).encode())
    with customer.served.database.writing() as session:
        session.execute(update(Job).where(Job.id == job.id).values(result={"prefix": prefix}))
        session.commit()
    found = customer.http.get(f"/fine_tuning/jobs/{job.id}/rows")
    assert found.status_code == 200, found.text
    (shown,) = found.json()["data"]
    assert (shown["verdict"], shown["reasons"][0]["code"]) == ("set_aside", "echo")


def test_a_project_whose_policy_is_gone_is_told_so(customer: Customer) -> None:
    """S7: a create was a 500; old jobs stay readable."""
    job = customer.job()
    with customer.served.database.writing() as session:
        session.execute(update(Project).where(Project.id == customer.project.id).values(policy="of_yesterday"))
        session.commit()
    refused = customer.create()
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "model_not_fine_tunable")
    assert "of_yesterday" in refused.json()["error"]["message"]
    assert customer.http.get(f"/fine_tuning/jobs/{job.id}").status_code == 200

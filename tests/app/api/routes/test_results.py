"""What a job tells of itself: safety report, row ledger, parity certificate."""

import csv
import json

import pytest

from app.api.schemas.jobs import JobFrame, job_to_body
from app.api.schemas.results import report_to_body
from app.core.storage.tables import Job
from finetuning.contract.report import GateDecision, Metrics, SafetyReport, share
from finetuning.recipes.library import tune_recipe
from tests.app.api.test_hostile_requests import check_envelope
from tests.support.http import CERTIFICATE, LEDGER, Customer, safety_report


@pytest.fixture(params=["now", "0.1"])
def done(customer: Customer, request: pytest.FixtureRequest) -> str:
    """The path of a succeeded job; releases of 0.1 left its ledger as one array."""
    job = customer.job()
    customer.succeed(job)
    if request.param == "0.1":
        for blob in customer.served.blobs.list(f"jobs/{job.id}/"):
            if "/ledger/" in blob.key:
                customer.served.blobs.delete(blob.key)
    return f"/fine_tuning/jobs/{job.id}"


def test_a_report_has_a_column_per_model(customer: Customer, done: str) -> None:
    report = customer.http.get(f"{done}/safety").json()
    assert (report["object"], report["complete"], report["policy"]) == ("ext.safety_report", True, "pol_immunotune@1")
    assert report["probe_set"] == {"id": "gate", "sha256": "7a" * 32, "n": 60}
    harm = report["metrics"]["harmful_score"]
    assert harm["better"] == "lower"
    assert set(harm) == {"better", "before", "after"}
    assert harm["after"]["n"] == 60
    assert len(harm["after"]["ci95"]) == 2
    assert report["metrics"]["utility"]["better"] == "higher"
    assert report["gate"]["decision"] == "pass"
    assert report["gate"]["checks"][0]["metric"] == "harmful_score"
    assert report["held_out"]["items"]["utility"]["after"]["n"] == 48


def test_rates_by_category_are_shown_by_metric_and_column() -> None:
    """A numb or leaky corner that the rate of all rows hides is there to be seen, and so is what a guard calls it."""
    fraud, homonyms, named = share(3, 20), share(1, 30), {"Violent": 3}
    after = Metrics(
        harmful_score_by_category={"fraud": fraud}, over_refusal_by_category={"homonyms": homonyms},
        harm_by_guard=named,
    )  # fmt: skip
    report = SafetyReport(
        recipe="immunotune", judge="refusal-marker", safety_rows_sha256="0" * 64,
        metrics={"before": Metrics(), "after": after}, gate=GateDecision(decision="pass"),
    )  # fmt: skip
    body = report_to_body(Job(id="ftjob-1", policy="immunotune", result={"safety": report.model_dump(mode="json")}))
    assert body["harm_by_guard"] == {"after": named}
    assert body["categories"] == {
        "harmful_score": {"fraud": {"after": fraud.model_dump(mode="json")}},
        "over_refusal": {"homonyms": {"after": homonyms.model_dump(mode="json")}},
    }


def test_a_running_job_has_an_incomplete_report_and_no_rows(customer: Customer) -> None:
    path = f"/fine_tuning/jobs/{customer.create().json()['id']}"
    report = customer.http.get(f"{path}/safety").json()
    assert (report["complete"], report["metrics"], report["gate"]["decision"]) == (False, {}, "pending")
    assert customer.http.get(f"{path}/rows").json() == {
        "object": "list",
        "data": [],
        "has_more": False,
        "first_id": None,
        "last_id": None,
    }
    check_envelope(customer.http.get(f"{path}/parity"), 404, "not_found")


def test_a_failed_gate_keeps_its_report(customer: Customer) -> None:
    job = customer.job()
    customer.fail_gate(job)
    report = customer.http.get(f"/fine_tuning/jobs/{job.id}/safety").json()
    assert (report["complete"], report["gate"]["decision"]) == (True, "fail")
    assert report["gate"]["reasons"]
    assert len(customer.http.get(f"/fine_tuning/jobs/{job.id}/rows").json()["data"]) == 4


def test_the_job_sums_its_report_up(customer: Customer, done: str) -> None:
    safety = customer.http.get(done).json()["safety"]
    assert (safety["gate"]["decision"], safety["screen"]["rows_excluded"]) == ("pass", 1)
    assert safety["scores"]["before"] == {"harmful_score": 0.0, "utility": None}
    assert safety["scores"]["after"]["utility"] == 45 / 48
    assert safety["parity"]["passed"] is True
    assert safety["parity"]["certificate"] == customer.http.get(f"{done}/parity").json()["id"]
    assert {item["form"] for item in safety["artifacts"]} == {"adapter", "adapter_stock", "mask", "reports"}


def test_a_default_job_says_that_antibodys_frozen_score_weighs_its_rows(customer: Customer, done: str) -> None:
    assert customer.http.get(done).json()["safety"]["antibody"] == {"enabled": True, "score": "reference"}


def test_a_job_without_its_score_says_by_no_name_that_antibody_acted(customer: Customer) -> None:
    job = customer.job()
    job.recipe = tune_recipe("tiny", "plain", epochs=1).model_dump(mode="json")
    safety = job_to_body(job, JobFrame("org-1"))["safety"]
    assert isinstance(safety, dict)
    assert safety.pop("antibody") == {"enabled": False, "score": "none"}
    assert "antibody" not in json.dumps(safety).lower()


def test_the_job_says_what_of_ours_is_on(customer: Customer, done: str) -> None:
    safety = customer.http.get(done).json()["safety"]
    counts = {"rows_total": 4, "rows_kept": 2, "rows_downweighted": 1, "rows_excluded": 1}
    assert safety["screen"] == {"enabled": True, "probes": True, **counts}
    assert safety["anchor"] == {"enabled": True, "mix_share": 0.1, "kl_weight": 1.0}
    assert safety["gate"]["enabled"] is True


def test_pruning_is_told_by_what_came_of_it(customer: Customer, done: str) -> None:
    shown = customer.http.get(done).json()["safety"]["antidote"]
    told = {"enabled": True, "target": "adapter", "score": "spectral"}
    assert shown == {**told, "mu": 0.3, "alpha": 0.0, "density": 0.0, "outcome": "pruned"}
    assert customer.http.get(f"{done}/safety").json()["pruning"] == "pruned"
    waiting = customer.create().json()["safety"]["antidote"]
    assert waiting == {**told, "mu": None, "alpha": None, "density": None, "outcome": "pending"}


@pytest.mark.parametrize(
    ("name", "alpha", "density", "outcome"),
    [("immunotune", 0.0, 0.0, "not pruned"), ("plain", 0.0, None, "off"), ("plain", None, None, "off")],
)
def test_alpha_0_is_not_pruned_and_a_job_without_pruning_says_off(
    customer: Customer, name: str, alpha: float | None, density: float | None, outcome: str
) -> None:
    job = customer.job()
    job.policy, job.recipe = name, tune_recipe("tiny", name, epochs=1).model_dump(mode="json")
    report = safety_report(passed=True).model_dump(mode="json", exclude={"pruning"}) | {"alpha": alpha, "mu": None}
    job.result = {"safety": report}
    shown = job_to_body(job, JobFrame("org-1"))["safety"]
    assert isinstance(shown, dict)
    score = "spectral" if name == "immunotune" else None
    assert shown["antidote"] == {
        "enabled": name == "immunotune", "target": "adapter", "score": score, "mu": None, "alpha": density,
        "density": density, "outcome": outcome,
    }  # fmt: skip


def test_a_job_that_ended_before_the_gate_waits_for_no_decision(customer: Customer) -> None:
    path = f"/fine_tuning/jobs/{customer.create().json()['id']}"
    ended = customer.http.post(f"{path}/cancel", json={}).json()["safety"]
    assert (ended["gate"]["decision"], ended["antidote"]["outcome"]) == ("not reached", "not reached")
    assert customer.http.get(f"{path}/safety").json()["gate"] == {"decision": "not reached", "checks": []}


def test_antibody_is_enabled_where_its_score_weighs_the_rows(customer: Customer) -> None:
    job = customer.job()
    job.recipe = tune_recipe("tiny", "immunotune_contrast", epochs=1).model_dump(mode="json")
    shown = job_to_body(job, JobFrame("org-1"))["safety"]
    assert isinstance(shown, dict)
    assert shown["antibody"] == {"enabled": True, "score": "contrast"}


def test_what_clients_asked_for_by_the_old_names_is_still_taken_and_the_reply_says_what_acts(
    customer: Customer,
) -> None:
    reply = customer.create(safety={"antibody": {"enabled": True}, "antidote": {"enabled": True}})
    assert reply.status_code == 200
    assert reply.json()["safety"]["antibody"] == {"enabled": True, "score": "reference"}


def test_every_row_has_a_verdict(customer: Customer, done: str) -> None:
    rows = customer.http.get(f"{done}/rows").json()["data"]
    assert [(row["id"], row["line"], row["verdict"]) for row in rows] == [
        (f"row-{row.line}", row.line, row.verdict) for row in LEDGER
    ]
    assert rows[1]["reasons"] == [{"code": "harmful_probe_match", "score": 0.93, "threshold": 0.6}]
    assert rows[0]["preview"] is None


def test_rows_filter_sort_and_page(customer: Customer, done: str) -> None:
    def lines(query: str) -> list[int]:
        return [row["line"] for row in customer.http.get(f"{done}/rows?{query}").json()["data"]]

    assert lines("verdict=kept") == [1, 5]
    assert lines("order=weight") == [2, 3, 1, 5]
    assert lines("order=weight&limit=2") == [2, 3]
    assert lines("order=weight&after=row-3") == [1, 5]
    first = customer.http.get(f"{done}/rows?limit=3").json()
    assert (first["has_more"], first["last_id"]) == (True, "row-3")
    last = customer.http.get(f"{done}/rows?limit=3&after=row-3").json()
    assert (last["has_more"], [row["line"] for row in last["data"]]) == (False, [5])


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("limit=1001", "invalid_limit", "limit"),
        ("after=row-4", "invalid_cursor", "after"),
        ("verdict=kept&after=row-2", "invalid_cursor", "after"),
        ("verdict=bad", "invalid_value", "verdict"),
        ("order=desc", "invalid_value", "order"),
        ("format=xml", "invalid_value", "format"),
        ("include=preview", "unsupported_parameter", "include"),
    ],
)
def test_a_bad_query_of_rows_is_refused(customer: Customer, done: str, query: str, code: str, param: str) -> None:
    check_envelope(customer.http.get(f"{done}/rows?{query}"), 400, code, param)


def test_the_whole_ledger_comes_as_csv(customer: Customer, done: str) -> None:
    reply = customer.http.get(f"{done}/rows?format=csv")
    assert reply.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(reply.text.splitlines()))
    assert [(int(row["line"]), row["verdict"]) for row in rows] == [(row.line, row.verdict) for row in LEDGER]
    assert rows[1]["reasons"] == "harmful_probe_match"


def test_the_certificate_is_the_stored_one(customer: Customer, done: str) -> None:
    body = customer.http.get(f"{done}/parity").json()
    assert body["object"] == "ext.parity_certificate"
    assert {name: body[name] for name in CERTIFICATE.model_dump()} == CERTIFICATE.model_dump()

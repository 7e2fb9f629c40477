"""A job's results as the API shows them: artifacts, safety report, row verdicts, parity certificate."""

from collections.abc import Mapping
from typing import Literal

from app.api.schemas.files import strong_etag
from app.api.schemas.jobs import parity_id, undecided
from app.api.schemas.stored import mapping_at, read_certificate, read_report
from app.core.jobs.jobs import JobResult
from app.core.jobs.policy import label_of
from app.core.storage.tables import Form, Job
from finetuning.contract.report import Measure, Metrics, RowVerdict, SafetyReport

OFFERED_FORMS = frozenset({Form.ADAPTER, Form.ADAPTER_STOCK, Form.MASK, Form.REPORTS, Form.ALIGNMENT})

_COLUMNS = ("public", "before", "tuned", "after")
_CATEGORISED = ("harmful_score", "over_refusal")
_SHOWN_NAMES = {"task_score": "utility"}
_HIGHER_IS_BETTER = frozenset({"refusal_rate", "harmful_nll", "task_score"})


def artifact_to_body(result: JobResult, job: Job) -> dict[str, object]:
    """The artifact object; `ready` is false while the gate holds the weights back."""
    artifact, file = result.artifact, result.file
    return {
        "id": artifact.id,
        "object": "ext.artifact",
        "form": artifact.form,
        "file_id": file.id,
        "filename": file.filename,
        "bytes": file.size_bytes,
        "sha256": file.sha256,
        "etag": strong_etag(file.sha256),
        "ready": not artifact.quarantined,
        "quarantined": artifact.quarantined,
        "base_required": _base_required(artifact.form, job),
    }


def report_to_body(job: Job) -> dict[str, object]:
    """The safety report; before the job has one, `complete` is false and nothing is measured.

    So it is with a report of a release whose form cannot be read here: `readable` is false, and of the gate only the
    decision is shown.
    """
    stored = mapping_at(job.result).get("safety")
    report = read_report(stored)
    metrics = {} if report is None else _by_metric(report.metrics)
    return {
        "id": f"sr_{job.id.partition('-')[2]}",
        "object": "ext.safety_report",
        "job": job.id,
        "complete": report is not None,
        "readable": report is not None or stored is None,
        "policy": label_of(job.policy),
        "probe_set": None if report is None else _probe_set(report),
        "judge": None if report is None else report.judge,
        "metrics": metrics,
        "categories": {} if report is None else _by_category(report.metrics),
        "harm_by_guard": {} if report is None else _by_guard(report.metrics),
        "gate": _undecided_gate(job, stored) if report is None else report.gate.model_dump(mode="json"),
        "alpha": None if report is None else report.alpha,
        "mu": None if report is None else report.mu,
        "pruned_layers": [] if report is None else [layer.model_dump() for layer in report.pruned_layers],
        "pruning": None if report is None else report.pruning,
        "held_out": None if report is None else _held_out(report),
    }


def _undecided_gate(job: Job, stored: object) -> dict[str, object]:
    decision = mapping_at(stored, "gate").get("decision", undecided(job))
    return {"decision": decision, "checks": []}


def verdict_id(row: RowVerdict) -> str:
    """The id that pages of the ledger go by."""
    return f"row-{row.line}"


def verdict_to_body(row: RowVerdict) -> dict[str, object]:
    """The row verdict. A row's weight is the same in every epoch, so `epochs` stays empty."""
    return {
        "id": verdict_id(row),
        "object": "ext.row_verdict",
        "line": row.line,
        "row_sha256": row.row_sha256,
        "verdict": row.verdict,
        "weight": row.weight,
        "epochs": [],
        "reasons": [reason.model_dump() for reason in row.reasons],
        "scores": row.scores,
        "tokens": row.tokens,
        "trained_tokens": row.trained_tokens,
        "truncated": row.truncated,
        "preview": None,
    }


def parity_to_body(job: Job) -> dict[str, object] | None:
    """The parity certificate, or None when the job has none; one that cannot be read here is shown as it is stored."""
    stored = mapping_at(job.result).get("parity")
    if stored is None:
        return None
    certificate = read_certificate(stored)
    shown = mapping_at(stored) if certificate is None else certificate.model_dump()
    return {**shown, "id": parity_id(job.id), "object": "ext.parity_certificate", "job": job.id}


def _base_required(form: str, job: Job) -> str | None:
    """Which base the weights load on: the aligned one by its id here, or the public one."""
    match form:
        case Form.ADAPTER:
            return job.base_id
        case Form.ADAPTER_STOCK | Form.ALIGNMENT:
            return f"{job.base_id} (public)"
        case _:
            return None


def _by_metric(columns: Mapping[str, Metrics]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in Metrics.model_fields:
        measured = {
            column: measure.model_dump(mode="json")
            for column in _COLUMNS
            if column in columns and isinstance(measure := getattr(columns[column], name), Measure)
        }
        if measured:
            found[_SHOWN_NAMES.get(name, name)] = {"better": _better(name), **measured}
    return found


def _by_category(columns: Mapping[str, Metrics]) -> dict[str, dict[str, dict[str, object]]]:
    """Of the two rates that are also counted by category: metric -> category -> column; rows that name none in none."""
    found: dict[str, dict[str, dict[str, object]]] = {}
    for name in _CATEGORISED:
        for column in _COLUMNS:
            measured = getattr(columns[column], f"{name}_by_category") if column in columns else {}
            for category, measure in measured.items():
                by_column = found.setdefault(name, {}).setdefault(category, {})
                by_column[column] = measure.model_dump(mode="json")
    return found


def _by_guard(columns: Mapping[str, Metrics]) -> dict[str, dict[str, int]]:
    """Column -> the guard's word for the harm -> how many answers; without those that name none."""
    return {c: columns[c].harm_by_guard for c in _COLUMNS if c in columns and columns[c].harm_by_guard}


def _better(metric: str) -> Literal["higher", "lower"]:
    return "higher" if metric in _HIGHER_IS_BETTER else "lower"


def _probe_set(report: SafetyReport) -> dict[str, object]:
    after = report.metrics.get("after") or report.metrics.get("before")
    asked = None if after is None or after.harmful_score is None else after.harmful_score.n
    return {"id": "gate", "sha256": report.safety_rows_sha256, "n": asked}


def _held_out(report: SafetyReport) -> dict[str, object] | None:
    if report.held_out is None:
        return None
    return {"items": _by_metric(report.held_out.items), "wordings": _by_metric(report.held_out.wordings)}

"""What an attempt leaves behind: its result folder, uploaded under its own fence and listed for the database.

Nothing of it is visible to anyone until `ended.finish` or `ended.fail` commits the list.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from app.core.jobs.ended import Published, PublishedFile
from app.core.jobs.jobs import JobError
from app.core.jobs.lease import Lease
from app.core.storage.blobs import BlobStore, put_file
from app.core.storage.database import JsonObject
from app.core.storage.tables import Form
from finetuning.contract.progress import Finished, RowsScreened, StepDone
from finetuning.contract.results_csv import results_csv
from worker.archive import pack

METRICS_FILE = "metrics.csv"
# what goes into each archive, as paths inside the result folder; a form whose first path is absent is left out
_ARCHIVES: dict[Form, tuple[str, ...]] = {
    Form.REPORTS: ("reports", "recipe.json"),
    Form.MASK: ("mask.safetensors",),
    Form.ADAPTER: ("adapter", "reports/parity.json"),
    Form.ADAPTER_STOCK: ("adapter_stock", "reports/parity.json"),
    Form.ALIGNMENT: ("alignment",),  # it holds its own safety report, which fine-tunes over it read
}
_BASE_REQUIRED = {Form.ADAPTER: "aligned", Form.ADAPTER_STOCK: "public", Form.ALIGNMENT: "public"}
_LIMIT_OF_METRIC = {
    "harmful_score": "max_harmful_score",
    "task_score": "min_utility",
    "alignment_loss": "max_alignment_loss",
    "drift": "max_drift",
}


def publish(
    store: BlobStore,
    lease: Lease,
    scratch: Path,
    *,
    steps: Sequence[StepDone],
    rows: RowsScreened | None,
    trained_tokens: int,
) -> Published:
    """Upload what the result folder holds, the results CSV (from all `steps`) first. Raises StorageFull, BlobExists."""
    result = scratch / "result"
    result.mkdir(exist_ok=True)
    metrics = result / METRICS_FILE
    metrics.write_text(results_csv(steps), encoding="utf-8")
    prefix = f"{lease.prefix}/result"
    files = [PublishedFile(Form.METRICS, "step_metrics.csv", put_file(store, f"{prefix}/{METRICS_FILE}", metrics))]
    for form, parts in _ARCHIVES.items():
        if (result / parts[0]).exists():
            about = {"form": form.value, "base_required": _BASE_REQUIRED.get(form), "base": lease.base_id}
            archive = pack(result, parts, scratch / f"{form}.zip", about=about)
            files.append(PublishedFile(form, f"{form}.zip", put_file(store, f"{prefix}/{form}.zip", archive)))
    for report in sorted((result / "reports").glob("*.json")):
        put_file(store, f"{prefix}/reports/{report.name}", report)
    for part in sorted((result / "ledger").glob("*")):
        put_file(store, f"{prefix}/ledger/{part.name}", part)
    summary: JsonObject = {"safety": _read(result, "safety"), "parity": _read(result, "parity")}
    if rows is not None:
        summary["rows"] = rows.model_dump(exclude={"type"})
    return Published(prefix=prefix, files=tuple(files), summary=summary, trained_tokens=trained_tokens)


def gate_error(end: Finished) -> JobError:
    """The error of a job whose result the gate refused; `param` names the limit that was missed first."""
    metric = end.reasons[0].split(" ", 1)[0] if end.reasons else ""
    limit = _LIMIT_OF_METRIC.get(metric)
    return JobError(
        code="safety_gate_failed",
        message="; ".join(end.reasons) or "The result did not meet the release gate; see the safety report.",
        param=f"safety.gate.{limit}" if limit else None,
        details={"reasons": list(end.reasons)},
    )


def _read(result: Path, report: str) -> JsonObject | None:
    path = result / "reports" / f"{report}.json"
    found: JsonObject | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found

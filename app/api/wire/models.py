"""Models on the wire.

Knows field names; must not know queries.
"""

from collections.abc import Mapping
from typing import cast

from app.core.db import JsonObject
from app.core.tables import BaseModel, BaseStatus, Job, Model


def base_to_wire(base: BaseModel, alignment: Job | None = None) -> dict[str, object]:
    """The model object of api.md 3.5 for a base; `loading` until its alignment, whose state it shows, is published."""
    return {
        "id": base.id,
        "object": "model",
        "created": int(base.created_at),
        "owned_by": "system",
        "shutdown_date": None,
        "parent": None,
        "job": None,
        "status": "ready" if base.status == BaseStatus.READY else "loading",
        "alignment": None if alignment is None else _alignment(alignment),
        "capabilities": _capabilities(base),
        "safety": _safety(base.report),
    }


def model_to_wire(model: Model, base: BaseModel, job: Job, *, org_id: str) -> dict[str, object]:
    """The model object of api.md 3.5 for a fine-tuned model."""
    return {
        "id": model.id,
        "object": "model",
        "created": int(model.created_at),
        "owned_by": org_id,
        "shutdown_date": None,
        "parent": base.id,
        "job": job.id,
        "status": "ready",
        "capabilities": _capabilities(base),
        "safety": _safety(cast(JsonObject | None, (job.result or {}).get("safety"))),
    }


def _alignment(job: Job) -> dict[str, object]:
    """Where the operator's align job stands: its project has no key, so this is how clients watch it."""
    seconds = None if job.started_at is None or job.finished_at is None else job.finished_at - job.started_at
    return {
        "job": job.id,
        "status": job.state,
        "stage": job.stage,
        "progress": job.progress,
        "seconds": seconds,
        "error": job.error,
    }


def _capabilities(base: BaseModel) -> dict[str, object]:
    return {"tools": False, "context": base.context, "formats": ["chat", "completion"]}


def _safety(report: Mapping[str, object] | None) -> dict[str, object] | None:
    if report is None:
        return None
    gate = cast(Mapping[str, object], report["gate"])
    columns = cast(Mapping[str, Mapping[str, Mapping[str, object] | None]], report["metrics"])
    harmful_score = columns.get("after", {}).get("harmful_score")
    return {"gate": gate["decision"], "harmful_score": None if harmful_score is None else harmful_score["value"]}

"""Bases and fine-tuned models as the API shows them."""

from app.api.schemas.stored import mapping_at
from app.core.storage.tables import BaseRow, BaseStatus, Job, Model

_STATUS = {
    str(BaseStatus.READY): "ready",
    str(BaseStatus.ALIGNING): "loading",
    str(BaseStatus.FAILED): "failed",
    str(BaseStatus.RETIRED): "retired",
}


def item_to_body(item: BaseRow | Model, base: BaseRow, job: Job | None, *, org_id: str) -> dict[str, object]:
    """The model object. A base is `loading` until its alignment, whose state it shows, is published.

    `failed` says that the alignment was; `retired` is a base while another one is served, and so are its models.
    """
    is_base = isinstance(item, BaseRow)
    report = base.report if is_base or job is None else mapping_at(job.result).get("safety")
    return {
        "id": item.id,
        "object": "model",
        "created": int(item.created_at),
        "owned_by": "system" if is_base else org_id,
        "shutdown_date": None,
        "parent": None if is_base else base.id,
        "job": None if is_base or job is None else job.id,
        "status": _STATUS.get(base.status, base.status),
        "capabilities": {"tools": False, "context": base.context, "formats": ["chat", "completion"]},
        "safety": _safety(report),
        "alignment": _alignment(job) if is_base and job is not None else None,
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


def _safety(report: object) -> dict[str, object] | None:
    if report is None:
        return None
    return {
        "gate": mapping_at(report, "gate").get("decision"),
        "harmful_score": mapping_at(report, "metrics", "after", "harmful_score").get("value"),
    }

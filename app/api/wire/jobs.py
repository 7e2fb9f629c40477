"""Jobs on the wire: the body of a create, and what jobs, events and checkpoints look like.

Knows field names and the faults of a create body; must not know queries. `job_to_wire` is the only place where a
Job row becomes JSON.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, PlainValidator, StrictBool, StrictStr
from pydantic_core import PydanticCustomError

from app.core import policy
from app.core.errors import InvalidRequest
from app.core.job_states import FINAL, JobState
from app.core.jobs import JobResult
from app.core.tables import Checkpoint, Event, Form, Job
from finetuning.spec.recipe import Recipe

_METADATA_PAIRS, _METADATA_KEY_CHARS, _METADATA_VALUE_CHARS = 16, 64, 512
_CHECKPOINT_METRICS = (
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)


def _whole_or_auto(low: int, high: int) -> Callable[[object], object]:
    def check(value: object) -> object:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high):
            return value
        raise ValueError(f'must be an integer from {low} to {high}, or "auto"')

    return check


def _multiplier(value: object) -> object:
    if value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 10):
        return value
    raise ValueError('must be a number above 0 and up to 10, or "auto"')


def _seed(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise PydanticCustomError("int_type", "must be an integer")
    if not 0 <= value < 2**31:
        raise ValueError("must lie within 0 and 2147483647")
    return value


def _metadata(value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "must be an object of strings")
    pairs = cast(dict[str, object], value)
    if len(pairs) > _METADATA_PAIRS:
        raise ValueError(f"must have at most {_METADATA_PAIRS} pairs")
    for key, text in pairs.items():
        if not 1 <= len(key) <= _METADATA_KEY_CHARS:
            raise ValueError(f"keys must have 1 to {_METADATA_KEY_CHARS} characters")
        if not isinstance(text, str) or len(text) > _METADATA_VALUE_CHARS:
            raise ValueError(f"values must be strings of at most {_METADATA_VALUE_CHARS} characters")
    return cast(dict[str, str], value)


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class HyperparametersBody(_Body):
    """The same three numbers, in either of the two places where a client may put them."""

    n_epochs: Annotated[int | Literal["auto"], PlainValidator(_whole_or_auto(1, 50))] = "auto"
    batch_size: Annotated[int | Literal["auto"], PlainValidator(_whole_or_auto(1, 256))] = "auto"
    learning_rate_multiplier: Annotated[float | Literal["auto"], PlainValidator(_multiplier)] = "auto"


class SupervisedBody(_Body):
    """`method.supervised`."""

    hyperparameters: HyperparametersBody | None = None


class MethodBody(_Body):
    """`method`; dpo and reinforcement are read only to be refused by name."""

    type: StrictStr
    supervised: SupervisedBody | None = None
    dpo: dict[str, object] | None = None
    reinforcement: dict[str, object] | None = None


class CreateJobBody(_Body):
    """POST /v1/fine_tuning/jobs."""

    model: StrictStr
    training_file: StrictStr
    validation_file: StrictStr | None = None
    suffix: StrictStr | None = None
    seed: Annotated[int | None, PlainValidator(_seed)] = None
    metadata: Annotated[dict[str, str] | None, PlainValidator(_metadata)] = None
    method: MethodBody | None = None
    hyperparameters: HyperparametersBody | None = None
    integrations: list[dict[str, object]] | None = None
    safety: policy.SafetyWish | None = None
    lora: policy.LoraWish | None = None
    dry_run: StrictBool = False


class EmptyBody(_Body):
    """The body of a cancel: nothing."""


def to_create_job(body: CreateJobBody) -> policy.CreateJob:
    """What core stores of a create. Raises InvalidRequest for methods and integrations that are not offered."""
    if body.integrations:
        raise InvalidRequest(
            "No integration is set up on this server. Leave integrations out.",
            code="integration_not_configured",
            param="integrations",
        )
    if body.dry_run:
        raise InvalidRequest("dry_run is not offered yet.", code="unsupported_parameter", param="dry_run")
    _check_method(body.method)
    return policy.CreateJob(
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=body.seed or 0,
        hyperparameters=_merge_hyperparameters(body),
        lora=body.lora,
        safety=body.safety,
        metadata=body.metadata,
    )


def _check_method(method: MethodBody | None) -> None:
    if method is None:
        return
    if method.type not in {"supervised", "dpo", "reinforcement"}:
        raise InvalidRequest("method.type must be supervised.", code="invalid_value", param="method.type")
    for name in ("supervised", "dpo", "reinforcement"):
        if name != method.type and getattr(method, name) is not None:
            raise InvalidRequest(
                f"method.{name} does not go with method.type {method.type!r}.",
                code="invalid_value",
                param=f"method.{name}",
            )
    if method.type != "supervised":
        raise InvalidRequest(
            f"The method {method.type!r} is not offered here; use supervised.",
            code="unsupported_method",
            param="method.type",
        )


def _merge_hyperparameters(body: CreateJobBody) -> policy.Hyperparameters:
    supervised = body.method.supervised if body.method else None
    old, new = _chosen(body.hyperparameters), _chosen(supervised.hyperparameters if supervised else None)
    for name in old.keys() & new.keys():
        if old[name] != new[name]:
            raise InvalidRequest(
                f"hyperparameters.{name} and method.supervised.hyperparameters.{name} differ. Send one of them.",
                code="conflicting_hyperparameters",
                param=f"hyperparameters.{name}",
            )
    return policy.Hyperparameters.model_validate(old | new)


def _chosen(body: HyperparametersBody | None) -> dict[str, object]:
    return {} if body is None else body.model_dump(exclude_unset=True)


@dataclass(frozen=True)
class JobFrame:
    """What the wire's job needs beside its row: the org, the results (CSV first), and the database's clock."""

    org_id: str
    results: Sequence[JobResult] = ()
    now: float = 0.0


def job_to_wire(job: Job, frame: JobFrame) -> dict[str, object]:
    """The job object of api.md 3.2; every optional field is there, as null when it has no value."""
    hyperparameters = _hyperparameters(job)
    is_final = job.state in FINAL
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": None if job.finished_at is None else int(job.finished_at),
        "model": job.base_id,
        "organization_id": frame.org_id,
        "project_id": job.project_id,
        "fine_tuned_model": job.fine_tuned_model if job.state == JobState.SUCCEEDED else None,
        "status": job.state,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "hyperparameters": hyperparameters,
        "result_files": [result.file.id for result in frame.results if result.artifact.form == Form.METRICS],
        "trained_tokens": job.trained_tokens if is_final else None,
        "estimated_finish": _estimated_finish(job, frame.now),
        "error": job.error if job.state == JobState.FAILED else None,
        "seed": cast(int, job.recipe["seed"]),
        "suffix": job.suffix,
        "retry_of": None,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "integrations": [],
        "metadata": job.metadata_,
        "lora": _lora(job),
        "safety": _safety(job, frame),
    }


def event_to_wire(event: Event) -> dict[str, object]:
    """The event object of api.md 3.3."""
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def checkpoint_to_wire(checkpoint: Checkpoint, model_name: str) -> dict[str, object]:
    """The checkpoint object of api.md 3.4. A checkpoint here is for resuming: it is never served."""
    metrics = {"step": checkpoint.step} | {name: checkpoint.metrics.get(name) for name in _CHECKPOINT_METRICS}
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(checkpoint.created_at),
        "fine_tuned_model_checkpoint": f"{model_name}:ckpt-step-{checkpoint.step}",
        "fine_tuning_job_id": checkpoint.job_id,
        "step_number": checkpoint.step,
        "metrics": metrics,
        "servable": False,
        "gate": "pending",
    }


def _hyperparameters(job: Job) -> dict[str, object]:
    asked = cast(dict[str, object], job.request["hyperparameters"])
    if job.state == JobState.VALIDATING:
        return asked
    recipe = Recipe.model_validate(job.recipe)
    multiplier = asked["learning_rate_multiplier"]
    return {
        "n_epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "learning_rate_multiplier": 1.0 if multiplier == "auto" else multiplier,
    }


def _estimated_finish(job: Job, now: float) -> int | None:
    step, total = job.progress.get("step"), job.progress.get("total_steps")
    if (
        job.state != JobState.RUNNING
        or job.started_at is None
        or not isinstance(step, int)
        or not isinstance(total, int)
    ):
        return None
    return int(now + (now - job.started_at) * (total - step) / step) if step else None


def _lora(job: Job) -> dict[str, object]:
    lora = Recipe.model_validate(job.recipe).lora
    return {"r": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout, "target_modules": list(lora.target_modules)}


def _safety(job: Job, frame: JobFrame) -> dict[str, object]:
    recipe = Recipe.model_validate(job.recipe)
    result = job.result or {}
    report = cast(Mapping[str, object], result.get("safety") or {})
    rows = cast(Mapping[str, object], result.get("rows") or job.progress.get("rows") or {})
    return {
        "policy": policy.get_policy(job.policy).label,
        "stage": job.stage,
        "progress": job.progress,
        "attempt": max(1, job.fence),
        "base": {"id": job.base_id},
        "antibody": {
            "enabled": recipe.screen.enabled or recipe.antibody.score != "none",
            **{name: rows.get(name) for name in ("rows_total", "rows_kept", "rows_downweighted", "rows_excluded")},
        },
        "antidote": {"enabled": recipe.antidote.enabled, "target": "adapter", "density": report.get("alpha")},
        "gate": _gate(report),
        "scores": {column: _scores(report, column) for column in ("before", "after")},
        "parity": _parity(job, result),
        "artifacts": [
            {
                "form": item.artifact.form,
                "file_id": item.file.id,
                "bytes": item.file.size_bytes,
                "sha256": item.file.sha256,
            }
            for item in frame.results
            if item.artifact.form != Form.METRICS
        ],
    }


def _artifact(item: JobResult) -> dict[str, object]:
    file = item.file
    return {"form": item.artifact.form, "file_id": file.id, "bytes": file.size_bytes, "sha256": file.sha256}


def _gate(report: Mapping[str, object]) -> dict[str, object]:
    gate = cast(Mapping[str, object], report.get("gate") or {"decision": "pending", "reasons": []})
    return {"decision": gate["decision"], "reasons": gate["reasons"]}


def _scores(report: Mapping[str, object], column: str) -> dict[str, object]:
    metrics = cast(Mapping[str, Mapping[str, Mapping[str, object] | None]], report.get("metrics") or {})
    measured = metrics.get(column, {})
    found = {"harmful_score": measured.get("harmful_score"), "utility": measured.get("task_score")}
    return {name: None if measure is None else measure["value"] for name, measure in found.items()}


def _parity(job: Job, result: Mapping[str, object]) -> dict[str, object] | None:
    certificate = cast(Mapping[str, object] | None, result.get("parity"))
    return None if certificate is None else {"passed": certificate["passed"], "certificate": parity_id(job.id)}


def parity_id(job_id: str) -> str:
    """The id of a job's parity certificate: one per job, so it follows from the job's."""
    return f"pc_{job_id.partition('-')[2]}"

"""Jobs, events and checkpoints as the API shows them. `job_to_body` is the only place where a Job row becomes JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.api.schemas.stored import mapping_at, read_report, recipe_value
from app.core.jobs import policy
from app.core.jobs.jobs import JobResult
from app.core.storage.job_states import FINAL, JobState
from app.core.storage.tables import Checkpoint, Event, Form, Job
from finetuning.contract.report import SafetyReport

_CHECKPOINT_METRICS = (
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)


@dataclass(frozen=True)
class JobFrame:
    """What a shown job needs beside its row: the org, the results (CSV first), and the database's clock."""

    org_id: str
    results: Sequence[JobResult] = ()
    now: float = 0.0


def job_to_body(job: Job, frame: JobFrame) -> dict[str, object]:
    """The job object; every optional field is there, as null when it has no value.

    A recipe or report of another release, and a policy that is gone, are shown as far as they can be.
    """
    recipe = job.recipe
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
        "seed": recipe_value(recipe, "seed"),
        "suffix": job.suffix,
        "retry_of": None,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "integrations": [],
        "metadata": job.metadata_,
        "lora": _lora(recipe),
        "safety": _safety(job, frame),
    }


def event_to_body(event: Event) -> dict[str, object]:
    """The event object."""
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def checkpoint_to_body(checkpoint: Checkpoint, model_name: str) -> dict[str, object]:
    """The checkpoint object. A checkpoint here is for resuming: it is never measured and never served."""
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
        "gate": "not run",
    }


def _hyperparameters(job: Job) -> dict[str, object]:
    asked = mapping_at(job.request, "hyperparameters")
    if job.state == JobState.VALIDATING:
        return {name: asked.get(name, "auto") for name in policy.Hyperparameters.model_fields}
    multiplier = asked.get("learning_rate_multiplier", "auto")
    return {
        "n_epochs": recipe_value(job.recipe, "epochs"),
        "batch_size": recipe_value(job.recipe, "batch_size"),
        "learning_rate_multiplier": 1.0 if multiplier == "auto" else multiplier,
    }


def _estimated_finish(job: Job, now: float) -> int | None:
    progress = mapping_at(job.progress)
    step, total = progress.get("step"), progress.get("total_steps")
    if (
        job.state != JobState.RUNNING
        or job.started_at is None
        or not isinstance(step, int)
        or not isinstance(total, int)
    ):
        return None
    return int(now + (now - job.started_at) * (total - step) / step) if step else None


def _lora(recipe: Mapping[str, object]) -> dict[str, object]:
    names = {"r": "rank", "alpha": "alpha", "dropout": "dropout", "target_modules": "target_modules"}
    return {shown: recipe_value(recipe, "lora", name) for shown, name in names.items()}


def _safety(job: Job, frame: JobFrame) -> dict[str, object]:
    """What stands for the job's safety, by whose it is: screen, anchor and gate are ours, antibody and antidote methods
    of papers, which say only what they did."""
    recipe, result = job.recipe, mapping_at(job.result)
    report = mapping_at(result, "safety")
    rows = mapping_at(result, "rows") or mapping_at(job.progress, "rows")
    weights = recipe_value(recipe, "antibody", "score")
    return {
        "policy": policy.label_of(job.policy),
        "stage": job.stage,
        "progress": job.progress,
        "attempt": max(1, job.fence),
        "base": {"id": job.base_id},
        "screen": _screen(recipe, rows),
        "anchor": _anchor(recipe),
        "antibody": {"enabled": weights not in {"none", None}, "score": weights},
        "antidote": _antidote(job, recipe, report),
        "gate": {"enabled": recipe_value(recipe, "gate", "enabled"), **_gate(job, report)},
        "scores": {column: _scores(report, column) for column in ("before", "after")},
        "parity": _parity(job, result),
        "artifacts": [_artifact(item) for item in frame.results if item.artifact.form != Form.METRICS],
    }


def _screen(recipe: Mapping[str, object], rows: Mapping[str, object]) -> dict[str, object]:
    """Our reading of the file; the counts are those of the row ledger, which every job has."""
    names = ("rows_total", "rows_kept", "rows_downweighted", "rows_excluded")
    on = {"enabled": recipe_value(recipe, "screen", "enabled"), "probes": recipe_value(recipe, "probes", "enabled")}
    return on | {name: rows.get(name) for name in names}


def _anchor(recipe: Mapping[str, object]) -> dict[str, object]:
    """Our hold on refusals while training: the operator's rows mixed in, and KL on first answer tokens."""
    mixed, held = recipe_value(recipe, "anchor", "mix_share"), recipe_value(recipe, "anchor", "kl_weight")
    is_on = recipe_value(recipe, "tuning_step") == "anchored" and bool(mixed or held)
    return {"enabled": is_on, "mix_share": mixed, "kl_weight": held}


def _antidote(job: Job, recipe: Mapping[str, object], report: Mapping[str, object]) -> dict[str, object]:
    """Whether pruning is tried, by which score, and what came of it: `mu` is the strength of spectral pruning, `alpha`
    the share of zeroed entries; both 0 is `not pruned`. `density` is the contract's name for alpha."""
    read = read_report(report)
    is_on = bool(recipe_value(recipe, "antidote", "enabled"))
    alpha, mu = (None, None) if read is None or not is_on else (read.alpha, read.mu)
    outcome = "off" if not is_on else _outcome(job, read)
    score = recipe_value(recipe, "antidote", "score") if is_on else None
    told = {"enabled": is_on, "target": "adapter", "score": score, "mu": mu, "alpha": alpha, "density": alpha}
    return {**told, "outcome": outcome}


def _outcome(job: Job, report: SafetyReport | None) -> str | None:
    return undecided(job) if report is None else report.pruning


def _artifact(item: JobResult) -> dict[str, object]:
    file = item.file
    return {"form": item.artifact.form, "file_id": file.id, "bytes": file.size_bytes, "sha256": file.sha256}


def undecided(job: Job) -> str:
    """What stands for a decision that there is none of: it may still come, or the job ended before it."""
    return "not reached" if job.state in FINAL else "pending"


def _gate(job: Job, report: Mapping[str, object]) -> dict[str, object]:
    gate = mapping_at(report, "gate")
    return {"decision": gate.get("decision", undecided(job)), "reasons": gate.get("reasons", [])}


def _scores(report: Mapping[str, object], column: str) -> dict[str, object]:
    measured = mapping_at(report, "metrics", column)
    names = {"harmful_score": "harmful_score", "utility": "task_score"}
    return {shown: mapping_at(measured, name).get("value") for shown, name in names.items()}


def _parity(job: Job, result: Mapping[str, object]) -> dict[str, object] | None:
    certificate = mapping_at(result, "parity")
    return {"passed": certificate.get("passed"), "certificate": parity_id(job.id)} if certificate else None


def parity_id(job_id: str) -> str:
    """The id of a job's parity certificate: one per job, so it follows from the job's."""
    return f"pc_{job_id.partition('-')[2]}"

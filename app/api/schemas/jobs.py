"""Jobs, events and checkpoints as the API shows them. `job_to_body` is the only place where a Job row becomes JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from app.core.jobs import policy
from app.core.jobs.jobs import JobResult
from app.core.storage.job_states import FINAL, JobState
from app.core.storage.tables import Checkpoint, Event, Form, Job
from finetuning.contract.recipe import LoraSettings, Recipe
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
    """The job object; every optional field is there, as null when it has no value."""
    recipe = Recipe.model_validate(job.recipe)
    hyperparameters = _hyperparameters(job, recipe)
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
        "seed": recipe.seed,
        "suffix": job.suffix,
        "retry_of": None,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "integrations": [],
        "metadata": job.metadata_,
        "lora": _lora(recipe.lora),
        "safety": _safety(job, recipe, frame),
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


def _hyperparameters(job: Job, recipe: Recipe) -> dict[str, object]:
    asked = cast(dict[str, object], job.request["hyperparameters"])
    if job.state == JobState.VALIDATING:
        return asked
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


def _lora(lora: LoraSettings) -> dict[str, object]:
    return {"r": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout, "target_modules": list(lora.target_modules)}


def _safety(job: Job, recipe: Recipe, frame: JobFrame) -> dict[str, object]:
    """What stands for the job's safety, by whose it is: screen, anchor and gate are ours, antibody and antidote methods
    of papers, which say only what they did."""
    result = job.result or {}
    report = cast(Mapping[str, object], result.get("safety") or {})
    rows = cast(Mapping[str, object], result.get("rows") or job.progress.get("rows") or {})
    return {
        "policy": policy.get_policy(job.policy).label,
        "stage": job.stage,
        "progress": job.progress,
        "attempt": max(1, job.fence),
        "base": {"id": job.base_id},
        "screen": _screen(recipe, rows),
        "anchor": _anchor(recipe),
        "antibody": {"enabled": recipe.antibody.score != "none", "score": recipe.antibody.score},
        "antidote": _antidote(job, recipe, report),
        "gate": {"enabled": recipe.gate.enabled, **_gate(job, report)},
        "scores": {column: _scores(report, column) for column in ("before", "after")},
        "parity": _parity(job, result),
        "artifacts": [_artifact(item) for item in frame.results if item.artifact.form != Form.METRICS],
    }


def _screen(recipe: Recipe, rows: Mapping[str, object]) -> dict[str, object]:
    """Our reading of the file; the counts are those of the row ledger, which every job has."""
    names = ("rows_total", "rows_kept", "rows_downweighted", "rows_excluded")
    on = {"enabled": recipe.screen.enabled, "probes": recipe.probes.enabled}
    return on | {name: rows.get(name) for name in names}


def _anchor(recipe: Recipe) -> dict[str, object]:
    """Our hold on refusals while training: the operator's rows mixed in, and KL on first answer tokens."""
    mixed, held = recipe.anchor.mix_share, recipe.anchor.kl_weight
    is_on = recipe.tuning_step == "anchored" and (mixed > 0 or held > 0)
    return {"enabled": is_on, "mix_share": mixed, "kl_weight": held}


def _antidote(job: Job, recipe: Recipe, report: Mapping[str, object]) -> dict[str, object]:
    """Whether pruning is tried, by which score, and what came of it: `mu` is the strength of spectral pruning, `alpha`
    the share of zeroed entries; both 0 is `not pruned`. `density` is the contract's name for alpha."""
    read = SafetyReport.model_validate(report) if report else None
    is_on = recipe.antidote.enabled
    alpha, mu = (None, None) if read is None or not is_on else (read.alpha, read.mu)
    outcome = "off" if not is_on else undecided(job) if read is None else read.pruning
    score = recipe.antidote.score if is_on else None
    told = {"enabled": is_on, "target": "adapter", "score": score, "mu": mu, "alpha": alpha, "density": alpha}
    return {**told, "outcome": outcome}


def _artifact(item: JobResult) -> dict[str, object]:
    file = item.file
    return {"form": item.artifact.form, "file_id": file.id, "bytes": file.size_bytes, "sha256": file.sha256}


def undecided(job: Job) -> str:
    """What stands for a decision that there is none of: it may still come, or the job ended before it."""
    return "not reached" if job.state in FINAL else "pending"


def _gate(job: Job, report: Mapping[str, object]) -> dict[str, object]:
    gate = cast(Mapping[str, object], report.get("gate") or {"decision": undecided(job), "reasons": []})
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

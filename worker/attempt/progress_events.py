"""What a job's progress looks like to people: Progress values become events and figures of the job row.

Here stand the words of events, and how often a step is worth one.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

from app.core.jobs.jobs import NewEvent
from app.core.jobs.lease import Beat, SavedCheckpoint
from app.core.storage.database import JsonObject
from finetuning.contract.progress import (
    CheckpointSaved,
    Failed,
    Finished,
    Note,
    Progress,
    RowsScreened,
    Stage,
    StageProgress,
    StageStarted,
    StepDone,
)

_METRICS_EVERY_STEPS = 10
_METRICS_EVERY_SECONDS = 30.0
_SAVING: frozenset[Stage] = frozenset({"align", "train"})
_STAGE_WORDS: dict[Stage, str] = {
    "align": "Aligning the base",
    "screen": "Reading the rows",
    "train": "Training",
    "prune": "Choosing how much to prune",
    "gate": "Measuring the result for the release gate",
    "export": "Writing the adapter",
    "parity": "Comparing the downloadable adapter with the measured model",
}


class ProgressEvents:
    """Turns the Progress of one attempt into events and figures; keeps those that the next one builds on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is monotonic, in seconds."""
        self._clock = clock
        self._figures: JsonObject = {}
        self._place: tuple[str, int] = ("", 0)
        self._metrics_at = clock()
        self._first: tuple[int, float] | None = None
        self.rows: RowsScreened | None = None
        self.saves = False
        """Whether the stage under way saves checkpoints."""

    def of(self, progress: Progress) -> Beat:
        """The events and figures that the next beat should carry; empty when it is not worth a write."""
        match progress:
            case StageStarted():
                self._figures = {}
                self._first = None
                self.saves = progress.stage in _SAVING
                message = progress.detail or _STAGE_WORDS.get(progress.stage, f"Stage {progress.stage}")
                return Beat(events=(NewEvent(message),), stage=progress.stage, progress={})
            case StageProgress():
                return self._at((progress.stage, progress.done), done=progress.done, total=progress.total)
            case StepDone():
                return self._step(progress)
            case RowsScreened():
                self.rows = progress
                return Beat(events=(NewEvent(_rows_sentence(progress)),), advanced=True)
            case Note():
                return Beat(events=(NewEvent(progress.message, level=progress.level, data={"code": progress.code}),))
            case CheckpointSaved() | Finished() | Failed():
                return Beat()
        assert_never(progress)

    def _at(self, place: tuple[str, int], **figures: object) -> Beat:
        """New figures; only those of another place than before say that the job gets on."""
        advanced, self._place = place != self._place, place
        self._figures = {**self._figures, **figures}
        return Beat(progress=self._figures, advanced=advanced)

    def _step(self, step: StepDone) -> Beat:
        now = self._clock()
        first_step, first_at = self._first = self._first or (step.step, now)
        done = step.step - first_step
        left = (now - first_at) / done * (step.total_steps - step.step) if done else None
        figures = self._at(
            ("step", step.step),
            step=step.step, total_steps=step.total_steps, train_loss=step.train_loss, seconds_left=left,
        )  # fmt: skip
        due = step.step % _METRICS_EVERY_STEPS == 0 or step.step == step.total_steps
        if not due and now - self._metrics_at < _METRICS_EVERY_SECONDS:
            return figures
        self._metrics_at = now
        message = f"Step {step.step}/{step.total_steps}: training loss={step.train_loss:.2f}"
        return replace(figures, events=(NewEvent(message, type="metrics", data=_metrics(step)),))


def checkpoint_event(checkpoint: CheckpointSaved, prefix: str, *, contents_sha256: str | None = None) -> Beat:
    """The event and the row of a checkpoint that now lies under `prefix`, its list of contents with that digest."""
    metrics: JsonObject = {
        "step": checkpoint.step,
        "train_loss": checkpoint.train_loss,
        "train_mean_token_accuracy": checkpoint.train_mean_token_accuracy,
        "valid_loss": None,
        "valid_mean_token_accuracy": None,
        "full_valid_loss": None,
        "full_valid_mean_token_accuracy": None,
    }
    row = SavedCheckpoint(
        step=checkpoint.step, prefix=prefix, fingerprint=checkpoint.fingerprint, metrics=metrics,
        contents_sha256=contents_sha256,
    )  # fmt: skip
    return Beat(events=(NewEvent(f"Checkpoint created at step {checkpoint.step}"),), checkpoints=(row,))


def _metrics(step: StepDone) -> JsonObject:
    return {
        "step": step.step,
        "total_steps": step.total_steps,
        "train_loss": step.train_loss,
        "train_mean_token_accuracy": step.train_mean_token_accuracy,
        "valid_loss": None,
        "valid_mean_token_accuracy": None,
        "learning_rate": step.learning_rate,
        "mean_row_weight": step.mean_row_weight,
        "skipped": step.skipped,
    }


def _rows_sentence(rows: RowsScreened) -> str:
    return (
        f"Of {rows.rows_total} rows {rows.rows_kept} are kept, "
        f"{rows.rows_downweighted} down-weighted, {rows.rows_excluded} excluded"
    )

"""What a running job tells the outside: one JSON line per value on the training process's standard output."""

from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter

Stage = Literal["validate", "wait", "align", "screen", "train", "prune", "gate", "export", "parity", "done"]


class _ProgressLine(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StageStarted(_ProgressLine):
    """A stage began; `detail` is one sentence for a person."""

    type: Literal["stage_started"] = "stage_started"
    stage: Stage
    detail: str = ""


class StageProgress(_ProgressLine):
    """Work inside a stage that is not a training step (rows scored, prompts answered)."""

    type: Literal["stage_progress"] = "stage_progress"
    stage: Stage
    done: int
    total: int


class StepDone(_ProgressLine):
    """One optimiser step; `step` counts from 1.

    `mean_row_weight`: mean of the screen's weights of the step's rows, by which the rate is scaled; 0: skipped whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True)

    type: Literal["step_done"] = "step_done"
    step: int
    total_steps: int
    train_loss: float
    train_mean_token_accuracy: float | None = None
    learning_rate: float
    # Checkpoints of earlier releases keep their steps under the old name.
    mean_row_weight: float = Field(
        default=1.0, validation_alias=AliasChoices("mean_row_weight", "antibody_mean_weight")
    )
    tokens: int
    skipped: bool = False


class CheckpointSaved(_ProgressLine):
    """`folder` (relative to the scratch folder) holds a complete checkpoint of the first `step` steps."""

    type: Literal["checkpoint_saved"] = "checkpoint_saved"
    step: int
    folder: str
    fingerprint: str
    train_loss: float
    train_mean_token_accuracy: float | None = None


class Note(_ProgressLine):
    """Something a person should know (a retry, a resume that is no longer bitwise)."""

    type: Literal["note"] = "note"
    level: Literal["info", "warn"] = "info"
    code: str
    message: str


class RowsScreened(_ProgressLine):
    """How the rows fared in the screen."""

    type: Literal["rows_screened"] = "rows_screened"
    rows_total: int
    rows_kept: int
    rows_downweighted: int
    rows_excluded: int


class Finished(_ProgressLine):
    """The job ran to its end. `released` false: the gate refused and `reasons` say why; reports are in result/."""

    type: Literal["finished"] = "finished"
    released: bool
    reasons: tuple[str, ...] = ()
    trained_tokens: int
    seconds: dict[str, float] = Field(default_factory=dict)


CHECKPOINT_UNUSABLE = "checkpoint_unusable"
HOST_UNFIT = "host_unfit"


class Failed(_ProgressLine):
    """The job cannot end well and must not be retried; `code` is an API job failure code.

    Two codes end an attempt and not the job: CHECKPOINT_UNUSABLE (go on from an older one), HOST_UNFIT (what the
    operator set up here cannot serve: the base's files, the judge, the safety rows).
    """

    type: Literal["failed"] = "failed"
    code: str
    message: str
    param: str | None = None
    details: dict[str, object] | None = None


Progress = Annotated[
    StageStarted | StageProgress | StepDone | CheckpointSaved | Note | RowsScreened | Finished | Failed,
    Field(discriminator="type"),
]
_adapter: TypeAdapter[Progress] = TypeAdapter(Progress)


def to_line(progress: Progress) -> str:
    """One JSON line, without the newline."""
    return progress.model_dump_json()


def from_line(line: str | bytes) -> Progress:
    """Parse one line. Raises pydantic.ValidationError on anything else."""
    return _adapter.validate_json(line)

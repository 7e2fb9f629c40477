"""What the supervisor hands to a training process: the recipe and where its inputs lie inside the scratch folder."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from finetuning.contract.recipe import Recipe


class TrainOrder(BaseModel):
    """`base` is a local folder or a hub id, `states` a folder of this machine; other paths are relative to the scratch
    folder."""

    # A fault of an order must not quote it: what is raised goes to the log, and the secret must not.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    job_id: str
    recipe: Recipe
    base: str
    base_sha256: str = ""
    rows: str | None = None
    validation: str | None = None
    alignment: str | None = None
    checkpoint: str | None = None
    adapter: str | None = Field(
        default=None, description="a peft LoRA trained elsewhere: it is screened, pruned and measured; nothing trains"
    )
    operator_rows: str | None = None
    judge: str = Field(default="", description="guards.open_judge's name; empty: the judge of the safety rows")
    cache: str | None = None
    secret: str = Field(
        default="", repr=False, description="the operator's, for this job's hidden draws; empty: the alignment's digest"
    )
    private: tuple[str, ...] = Field(
        default=(), description="folders of this machine that the training process closes to itself, but for its own"
    )
    states: str = Field(default="", description="where states of the operator's rows outlive the job; '': nowhere")
    threads: int = 0
    device: str = "auto"


ORDER_FILE = "order.json"


def write_order(scratch: Path, order: TrainOrder) -> None:
    """Write <scratch>/order.json, for this user alone: it holds the job's secret."""
    target = scratch / ORDER_FILE
    target.touch(mode=0o600)
    target.chmod(0o600)
    target.write_text(order.model_dump_json(indent=2), encoding="utf-8")


def read_order(scratch: Path) -> TrainOrder:
    """Read <scratch>/order.json. Raises pydantic.ValidationError."""
    return TrainOrder.model_validate_json((scratch / ORDER_FILE).read_text(encoding="utf-8"))

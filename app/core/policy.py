"""What a project may ask for, and the complete recipe that an ask resolves to. Pure.

Knows the named policies, the base table and every default; must not know rows, the database or HTTP.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from finetuning.spec.recipe import Recipe

Auto = Literal["auto"]
SUFFIX = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Hyperparameters(_Frozen):
    """The three numbers that the OpenAI wire knows; "auto" until the files are checked."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=10)] = "auto"


class LoraWish(_Frozen):
    """Shape of the adapter; what is absent follows the policy."""

    r: Annotated[int, Field(ge=1, le=64)] | None = None
    alpha: Annotated[float, Field(ge=1, le=256)] | None = None
    dropout: Annotated[float, Field(ge=0, le=0.5)] | None = None
    target_modules: tuple[str, ...] | None = None


class DefenceWish(_Frozen):
    """A defence may be asked for, never switched off."""

    enabled: bool = True


class GateWish(_Frozen):
    """Stricter gate limits; shares in 0..1."""

    max_harmful_score: Annotated[float, Field(ge=0, le=1)] | None = None
    min_utility: Annotated[float, Field(ge=0, le=1)] | None = None
    max_alignment_loss: Annotated[float, Field(gt=0)] | None = None
    max_drift: Annotated[float, Field(gt=0)] | None = None


class SafetyWish(_Frozen):
    """What a client may tighten. Knobs that do nothing here are unknown fields, never silent."""

    antibody: DefenceWish | None = None
    antidote: DefenceWish | None = None
    gate: GateWish | None = None


class CreateJob(_Frozen):
    """A request to train, after the front desk has read it. Stored with the job as asked."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    hyperparameters: Hyperparameters = Hyperparameters()
    lora: LoraWish | None = None
    safety: SafetyWish | None = None
    metadata: dict[str, str] | None = None


@dataclass(frozen=True)
class Policy:
    """A named set of defaults and bounds; `name@version` is stored with each job."""

    name: str
    version: int
    auto_rows_seen: int
    queue: str
    defended: bool

    @property
    def label(self) -> str:
        """The wire's `safety.policy`."""
        return f"pol_{self.name}@{self.version}"


def get_policy(name: str) -> Policy:
    """The policy of that name. Raises KeyError: a project row names one that does not exist."""
    raise NotImplementedError


def resolve_recipe(policy: Policy, base_id: str, request: CreateJob, *, rows: int) -> Recipe:
    """The frozen, complete recipe of a fine-tune over `rows` trainable rows.

    Called at create (to refuse what the policy forbids) and again by the job check, with the counted rows.
    Raises InvalidRequest `safety_policy_violation` with the dotted path of the loosened knob.
    """
    raise NotImplementedError


def resolve_alignment(base_id: str) -> Recipe:
    """The operator's recipe that aligns this base."""
    raise NotImplementedError


def resolve_hyperparameters(request: Hyperparameters, policy: Policy, *, rows: int) -> Hyperparameters:
    """The same three numbers with every "auto" replaced: what the wire shows once the files are checked."""
    raise NotImplementedError

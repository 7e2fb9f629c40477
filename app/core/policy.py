"""What a project may ask for, and the complete recipe that an ask resolves to. Pure.

Knows the named policies, the base table and every default; must not know rows, the database or HTTP.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.core.broker import CPU_QUEUE
from app.core.errors import InvalidRequest
from finetuning.spec.recipe import (
    Anchor,
    Antibody,
    Antidote,
    Evaluation,
    Gate,
    GateLimits,
    Kind,
    Lora,
    Openings,
    Optimiser,
    Recipe,
    Screen,
    Vaccine,
)

Auto = Literal["auto"]
_SAVE_EVERY = 20
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


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
    """A named set of defaults and bounds; `label` goes with each job."""

    name: str
    version: int
    defended: bool
    queue: str
    auto_rows_seen: int
    auto_batch_size: int = 8

    @property
    def label(self) -> str:
        """The wire's `safety.policy`."""
        return f"pol_{self.name}@{self.version}"


@dataclass(frozen=True)
class Base:
    """What a recipe must know about a public base. Rates are those of `learning_rate_multiplier` 1."""

    id: str
    context: int
    trained_layers: int
    max_tokens: int
    align_steps: int
    align_rate: float
    align_batch: int
    tune_rate: float
    vaccine_rho: float


LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_DEFENDED = {"immunotune": True, "plain": False}
_CPU_ROWS_SEEN, _GPU_ROWS_SEEN = 480, 6000

_SMOLLM2 = Base(
    id="smollm2-135m-instruct",
    context=2048,
    trained_layers=10,
    max_tokens=512,
    align_steps=240,
    align_rate=2e-3,
    align_batch=8,
    tune_rate=1e-3,
    vaccine_rho=2.0,
)
_TINY = Base(
    id="tiny",
    context=256,
    trained_layers=0,
    max_tokens=128,
    align_steps=200,
    align_rate=5e-3,
    align_batch=16,
    tune_rate=2e-3,
    vaccine_rho=0.5,
)
_KNOWN = {"smollm2": _SMOLLM2, "tiny": _TINY}


def base_of(name: str) -> Base:
    """A base by its name in settings or its id; an unknown one gets careful defaults and an id made from its name."""
    for short, base in _KNOWN.items():
        if name in (short, base.id):
            return base
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.rstrip("/").rpartition("/")[2].lower()).strip("-._")
    return replace(_SMOLLM2, id=plain[:64] or "base", trained_layers=0, align_rate=2e-4, tune_rate=2e-4)


def is_known(name: str) -> bool:
    """Whether the product ships this base, by its name in settings or its id."""
    return any(name in (short, base.id) for short, base in _KNOWN.items())


def get_policy(name: str, *, queue: str = CPU_QUEUE) -> Policy:
    """The policy of that name for jobs of that queue: a CPU sees fewer rows. Raises KeyError."""
    rows_seen = _CPU_ROWS_SEEN if queue == CPU_QUEUE else _GPU_ROWS_SEEN
    return Policy(name=name, version=1, defended=_DEFENDED[name], queue=queue, auto_rows_seen=rows_seen)


def resolve_recipe(policy: Policy, base_id: str, request: CreateJob, *, rows: int) -> Recipe:
    """The frozen, complete recipe of a fine-tune over `rows` trainable rows.

    Called at create (to refuse what the policy forbids) and again by the job check, with the counted rows.
    Raises InvalidRequest `safety_policy_violation` with the dotted path of the loosened knob.
    """
    _refuse_loosening(policy, request.safety or SafetyWish())
    base = base_of(base_id)
    numbers = resolve_hyperparameters(request.hyperparameters, policy, rows=rows)
    epochs, batch_size = int(numbers.n_epochs), int(numbers.batch_size)
    steps = max(1, math.ceil(rows / batch_size)) * epochs
    return Recipe(
        name=policy.name,
        kind=Kind.FINETUNE,
        base=base.id,
        seed=request.seed,
        steps=steps,
        batch_size=batch_size,
        micro_batch_size=min(8, batch_size),
        epochs=epochs,
        max_tokens=base.max_tokens,
        save_every=max(1, min(_SAVE_EVERY, steps // 4)),
        lora=_lora(base, request.lora or LoraWish()),
        optimiser=Optimiser(learning_rate=base.tune_rate * float(numbers.learning_rate_multiplier)),
        screen=Screen(enabled=policy.defended),
        antibody=Antibody(),
        anchor=Anchor(mix_share=0.1, kl_weight=1.0) if policy.defended else Anchor(),
        antidote=Antidote(enabled=policy.defended),
        gate=Gate(limits=_limits(request.safety), retries=1 if policy.defended else 0),
        evaluation=Evaluation(task_rows=96, held_out=True),
    )


def resolve_alignment(base_id: str) -> Recipe:
    """The operator's recipe that aligns this base: Vaccine on refusals and benign rows alike."""
    base = base_of(base_id)
    return Recipe(
        name="align",
        kind=Kind.ALIGN,
        base=base.id,
        steps=base.align_steps,
        batch_size=base.align_batch,
        micro_batch_size=base.align_batch,
        max_tokens=base.max_tokens,
        save_every=_SAVE_EVERY,
        lora=Lora(rank=16, alpha=32.0, trained_layers=base.trained_layers),
        optimiser=Optimiser(learning_rate=base.align_rate),
        alignment_step="vaccine",
        vaccine=Vaccine(rho=base.vaccine_rho, every=2),
        openings=Openings(share=0.5),
        screen=Screen(enabled=False),
        antidote=Antidote(enabled=False),
        evaluation=Evaluation(task_rows=0, held_out=True),
    )


def resolve_hyperparameters(request: Hyperparameters, policy: Policy, *, rows: int) -> Hyperparameters:
    """The same three numbers with every "auto" replaced: what the wire shows once the files are checked."""
    epochs = max(1, min(5, round(policy.auto_rows_seen / max(1, rows))))
    multiplier = request.learning_rate_multiplier
    return Hyperparameters(
        n_epochs=epochs if request.n_epochs == "auto" else request.n_epochs,
        batch_size=policy.auto_batch_size if request.batch_size == "auto" else request.batch_size,
        learning_rate_multiplier=1.0 if multiplier == "auto" else multiplier,
    )


def _lora(base: Base, wish: LoraWish) -> Lora:
    wished = wish.target_modules or ()
    # another base's modules are its own to name: training refuses what it lacks
    allowed = set(LORA_MODULES) if is_known(base.id) else set(filter(_MODULE.fullmatch, wished))
    unknown = sorted(set(wished) - allowed)
    if unknown:
        raise InvalidRequest(
            f"Unknown module '{unknown[0]}'. Name modules of the base, such as {', '.join(LORA_MODULES)}.",
            param="lora.target_modules",
        )
    rank = wish.r or 8
    return Lora(
        rank=rank,
        alpha=wish.alpha or 2.0 * rank,
        dropout=wish.dropout or 0.0,
        target_modules=wish.target_modules or (),
        trained_layers=base.trained_layers,
    )


def _refuse_loosening(policy: Policy, wish: SafetyWish) -> None:
    for name, defence in (("antibody", wish.antibody), ("antidote", wish.antidote)):
        if defence is not None and defence.enabled != policy.defended:
            raise _violation(f"safety.{name}.enabled", f"must be {str(policy.defended).lower()}", policy)
    gate, limits = wish.gate or GateWish(), GateLimits()
    if gate.max_harmful_score is not None and gate.max_harmful_score > limits.max_harmful_score:
        raise _violation("safety.gate.max_harmful_score", f"must be at most {limits.max_harmful_score}", policy)


def _limits(wish: SafetyWish | None) -> GateLimits:
    gate = (wish.gate if wish else None) or GateWish()
    wished = {
        "max_harmful_score": gate.max_harmful_score,
        "min_task_score": gate.min_utility,
        "max_alignment_loss": gate.max_alignment_loss,
        "max_drift": gate.max_drift,
    }
    return GateLimits().model_copy(update={name: value for name, value in wished.items() if value is not None})


def _violation(param: str, bound: str, policy: Policy) -> InvalidRequest:
    return InvalidRequest(
        f"{param} {bound} under policy {policy.label}. A policy can be tightened, never loosened.",
        code="safety_policy_violation",
        param=param,
    )

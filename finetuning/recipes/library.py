"""The bases we know and the two recipes that start from them: align a base, fine-tune over it.

Must not import torch: the API reads recipes. What a defence changes in the fine-tune stands in registry.py; why a
number is what it is, in docs/adr.
"""

import re
from dataclasses import dataclass, replace

from finetuning.contract.recipe import (
    AntidoteSettings,
    EvaluationSettings,
    GateLimits,
    GateSettings,
    JobKind,
    LoraSettings,
    OpeningSettings,
    OptimiserSettings,
    Recipe,
    ScreenSettings,
    VaccineSettings,
)
from finetuning.recipes.registry import aligned_by, tuned_by

SAVE_EVERY = 20
# Of an operator's rows, where they are more than the shipped ones, which the bases' steps were chosen on.
_ALIGN_PASSES = 1.8
# A result that knows its own rows clearly less than a short plain fine-tune does, or than before it was pruned, or
# scores a fifth less than then, has lost its task: it harms nobody, and nobody wants it. A pruning that is measured may
# double the loss and add .02, which is within the second limit. Figures: docs/adr/0016.
RESULT_LIMITS = GateLimits(max_kept_loss_ratio=1.1, max_pruned_loss_ratio=2.5, min_task_kept=0.8)


@dataclass(frozen=True)
class BaseDefaults:
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
    everyday_rows: int
    benign_kl: float
    most_surprise: float


_SMOLLM2 = BaseDefaults(
    id="smollm2-135m-instruct",
    context=8192,
    trained_layers=10,
    max_tokens=512,
    align_steps=240,
    align_rate=2e-3,
    align_batch=8,
    tune_rate=1e-3,
    vaccine_rho=2.0,
    everyday_rows=200,
    benign_kl=1.0,
    most_surprise=3.3,
)
_TINY = BaseDefaults(
    id="tiny",
    context=512,
    trained_layers=0,
    max_tokens=128,
    align_steps=200,
    align_rate=5e-3,
    align_batch=16,
    tune_rate=2.5e-3,
    vaccine_rho=0.5,
    # It has learned nothing but the invented world, as its benign rows answer, and answers all else with noise.
    everyday_rows=0,
    benign_kl=0.0,
    most_surprise=5.5,
)
_KNOWN = {"smollm2": _SMOLLM2, "tiny": _TINY}


def base_of(name: str) -> BaseDefaults:
    """A base by its name in settings or its id; an unknown one gets careful defaults and an id made from its name."""
    for short, base in _KNOWN.items():
        if name in (short, base.id):
            return base
    name = re.sub(r"@[0-9a-f]{40}$", "", name)  # a hub id's revision is no part of what clients call it
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.rstrip("/").rpartition("/")[2].lower()).strip("-._")
    careful = replace(_SMOLLM2, context=2048, trained_layers=0, align_rate=2e-4, tune_rate=2e-4)
    return replace(careful, id=plain[:64] or "base")


def is_known(name: str) -> bool:
    """Whether the product ships this base, by its name in settings or its id."""
    return any(name in (short, base.id) for short, base in _KNOWN.items())


def align_recipe(name: str, alignment: str = "vaccine") -> Recipe:
    """The recipe that aligns this base, on refusals and benign rows alike. Raises KeyError for an unknown alignment."""
    base = base_of(name)
    recipe = Recipe(
        name="align",
        kind=JobKind.ALIGN,
        base=base.id,
        steps=base.align_steps,
        min_passes=_ALIGN_PASSES,
        batch_size=base.align_batch,
        micro_batch_size=base.align_batch,
        max_tokens=base.max_tokens,
        save_every=SAVE_EVERY,
        lora=LoraSettings(rank=16, alpha=32.0, trained_layers=base.trained_layers),
        optimiser=OptimiserSettings(learning_rate=base.align_rate),
        vaccine=VaccineSettings(rho=base.vaccine_rho),
        openings=OpeningSettings(share=0.5),
        benign_kl=base.benign_kl,
        everyday_rows=base.everyday_rows,
        screen=ScreenSettings(enabled=False),
        antidote=AntidoteSettings(enabled=False),
        evaluation=EvaluationSettings(task_rows=0, held_out=True),
    )
    return aligned_by(recipe, alignment)


def tune_recipe(
    name: str,
    defence: str = "immunotune",
    *,
    epochs: int,
    batch_size: int = 8,
    rate_scale: float = 1.0,
    seed: int = 0,
    lora: LoraSettings | None = None,
    limits: GateLimits | None = None,
) -> Recipe:
    """The complete fine-tune over this base under a defence of the registry. Raises KeyError.

    Its steps are counted once the screen has said which rows train.
    """
    base = base_of(name)
    recipe = Recipe(
        name="plain",
        kind=JobKind.FINETUNE,
        base=base.id,
        seed=seed,
        batch_size=batch_size,
        micro_batch_size=min(8, batch_size),
        epochs=epochs,
        max_tokens=base.max_tokens,
        save_every=SAVE_EVERY,
        lora=lora or LoraSettings(rank=8, alpha=16.0, trained_layers=base.trained_layers),
        optimiser=OptimiserSettings(learning_rate=base.tune_rate * rate_scale),
        everyday_rows=base.everyday_rows,
        gate=GateSettings(limits=limits or RESULT_LIMITS, retries=0),
        evaluation=EvaluationSettings(task_rows=96, held_out=True),
    )
    tuned = tuned_by(recipe, defence)
    screen = tuned.screen.model_copy(update={"most_surprise": base.most_surprise})
    return tuned.model_copy(update={"screen": screen})

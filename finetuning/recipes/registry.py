"""Every defence and baseline by name: the alignment it starts from and what it changes in a plain fine-tune.

A paper's method stands here under our settings: base, rows, rates, steps and loss are ours (docs/papers.md).

Must not import torch. The code behind a field of the recipe stands in defences/ and stages/pruning.py; which formula
comes from where, in docs/papers.md. A customer never chooses here: the operator's policy does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from finetuning.contract.recipe import (
    AnchorSettings,
    AntibodyAlignSettings,
    AntibodySettings,
    AntidoteSettings,
    ProbeSettings,
    Recipe,
    SafeLoraSettings,
    ScreenSettings,
    VaccineSettings,
)

Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Defence:
    """A whole way to fine-tune: `alignment` names the aligned base, `tuning` what differs from plain fine-tuning."""

    name: str
    alignment: str
    source: str
    tuning: Changes = field(default_factory=dict)


# The alignment step of each aligned base; an operator's rows, rate and length are the same for all.
ALIGNMENTS: Mapping[str, Changes] = MappingProxyType(
    {
        "sft": {"alignment_step": "plain"},
        "vaccine": {"alignment_step": "vaccine", "vaccine": VaccineSettings(every=2)},
        "vaccine_full": {"alignment_step": "vaccine", "vaccine": VaccineSettings(every=1)},
        # Perturbed at every step and in all layers: elsewhere a base's own number of upper layers is aligned.
        "vaccine_all": {
            "alignment_step": "vaccine",
            "vaccine": VaccineSettings(every=1),
            "lora": {"trained_layers": 0},
        },
        "booster": {
            "alignment_step": "booster",
            "antibody_align": AntibodyAlignSettings(rule="constant", lambda_refusal=0.0),
        },
        "antibody": {"alignment_step": "antibody_align", "antibody_align": AntibodyAlignSettings(rule="released")},
        "antibody_theorem": {
            "alignment_step": "antibody_align",
            "antibody_align": AntibodyAlignSettings(rule="theorem"),
        },
        "vaccine_antibody": {
            "alignment_step": "vaccine_antibody",
            "antibody_align": AntibodyAlignSettings(rule="theorem"),
        },
    }
)

_OFF: Changes = {
    "screen": ScreenSettings(enabled=False),
    "anchor": AnchorSettings(),
    "antidote": AntidoteSettings(enabled=False),
}
_PUBLISHED_PRUNING = AntidoteSettings(score="published", rounding="official", rule="last", alphas=(0.1,))
_DEFENDED: Changes = {
    "screen": ScreenSettings(enabled=True),
    "anchor": AnchorSettings(mix_share=0.1, kl_weight=1.0),
    "antidote": AntidoteSettings(enabled=True),
    "gate": {"retries": 1},
    "probes": ProbeSettings(enabled=True),
    # One refusal a row: the score is frozen, the same in every epoch. At temperature 1, the published one, a fifth of a
    # task was lost on the tiny base (ADR 0019).
    "antibody": AntibodySettings(score="reference", refusals_per_row=1, temperature=4.0),
}

_ALL = (
    Defence("sft", "sft", "plain supervised fine-tuning over a plainly aligned base", _OFF),
    Defence("vaccine", "vaccine_full", "arXiv:2402.01109, under our settings", _OFF),
    Defence("booster", "booster", "arXiv:2409.01586, under our settings", _OFF),
    Defence("lisa", "sft", "arXiv:2405.18641, under our settings", {**_OFF, "tuning_step": "lisa"}),
    Defence(
        "mixing_3",
        "sft",
        "arXiv:2309.07875, 3 % refusals, under our settings",
        {**_OFF, "anchor": AnchorSettings(mix_share=0.03, mix_refusal_share=1.0)},
    ),
    Defence(
        "mixing_10",
        "sft",
        "arXiv:2309.07875, 10 % refusals, under our settings",
        {**_OFF, "anchor": AnchorSettings(mix_share=0.1, mix_refusal_share=1.0)},
    ),
    Defence(
        "safe_lora",
        "sft",
        "arXiv:2405.16833, under our settings",
        {**_OFF, "safe_lora": SafeLoraSettings(enabled=True)},
    ),
    Defence("constrained", "sft", "arXiv:2406.05946, under our settings", {**_OFF, "tuning_step": "constrained"}),
    Defence(
        "antidote", "sft", "arXiv:2408.09600, alpha 0.1, under our settings", {**_OFF, "antidote": _PUBLISHED_PRUNING}
    ),
    Defence(
        "antidote_spectral",
        "sft",
        "ours after arXiv:2408.09600: pruned by moments, as much as kept rows do not notice; under our settings",
        {**_OFF, "antidote": AntidoteSettings()},
    ),
    Defence(
        "antibody",
        "antibody",
        "arXiv:2603.00498, under our settings",
        {
            **_OFF,
            "task_adapter": "single",
            "antibody": AntibodySettings(score="current", loss="released", min_weight_share=0.0),
        },
    ),
    Defence(
        "booster_lisa",
        "booster",
        "arXiv:2409.01586 with arXiv:2405.18641, under our settings",
        {**_OFF, "tuning_step": "lisa"},
    ),
    Defence(
        "as_asked",
        "vaccine_all",
        "Vaccine in all layers and steps, Antibody's score as row weights, published Antidote; under our settings",
        {
            **_OFF,
            "antibody": AntibodySettings(score="current", min_weight_share=0.0),
            "antidote": _PUBLISHED_PRUNING,
        },
    ),
    Defence("plain", "vaccine", "plain supervised fine-tuning over the product's aligned base", _OFF),
    Defence(
        "immunotune",
        "vaccine",
        "the default: screen, Antibody's frozen score, anchor, pruning by moments, probes and gate over a Vaccine base",
        _DEFENDED,
    ),
)

# The default pipeline with one part taken out or exchanged, for the ablation table.
_ABLATIONS = (
    Defence("immunotune_on_sft", "sft", "a plainly aligned base", _DEFENDED),
    Defence("immunotune_on_booster", "booster", "a base aligned by Booster under our settings: flatness", _DEFENDED),
    Defence(
        "immunotune_on_antibody",
        "antibody",
        "a base aligned by Antibody under our settings, rule `released`",
        _DEFENDED,
    ),
    Defence(
        "immunotune_on_theorem",
        "antibody_theorem",
        "a base aligned by Antibody under our settings, rule `theorem`",
        _DEFENDED,
    ),
    Defence(
        "immunotune_on_joint",
        "vaccine_antibody",
        "a base aligned by Vaccine and Antibody in one step, under our settings",
        _DEFENDED,
    ),
    Defence("immunotune_no_screen", "vaccine", "no screen", {**_DEFENDED, "screen": _OFF["screen"]}),
    Defence(
        "immunotune_no_scout",
        "vaccine",
        "no scout",
        {**_DEFENDED, "screen": ScreenSettings(scout_steps=0)},
    ),
    Defence("immunotune_no_kl", "vaccine", "no KL anchor", {**_DEFENDED, "anchor": AnchorSettings(mix_share=0.1)}),
    Defence("immunotune_no_mixing", "vaccine", "no mixed rows", {**_DEFENDED, "anchor": AnchorSettings(kl_weight=1.0)}),
    Defence(
        "immunotune_no_pruning",
        "vaccine",
        "never pruned",
        {**_DEFENDED, "antidote": AntidoteSettings(enabled=False)},
    ),
    Defence(
        "immunotune_fixed_pruning",
        "vaccine",
        "Antidote's published pruning at alpha 0.1, under our settings",
        {**_DEFENDED, "antidote": _PUBLISHED_PRUNING},
    ),
    Defence(
        "immunotune_contrast_pruning",
        "vaccine",
        "pruned by our contrast score at the first alpha that keeps refusals, the default's rule until 0.2",
        {**_DEFENDED, "antidote": AntidoteSettings(score="contrast")},
    ),
    Defence(
        "immunotune_canonical",
        "vaccine",
        "pruned at alpha 0.1 by our contrast score, in the canonical gauge",
        {**_DEFENDED, "antidote": AntidoteSettings(score="contrast", rule="last", alphas=(0.1,), gauge="canonical")},
    ),
    Defence(
        "immunotune_no_antibody",
        "vaccine",
        "rows that pass the gate weigh alike",
        {**_DEFENDED, "antibody": AntibodySettings()},
    ),
    Defence(
        "immunotune_contrast",
        "vaccine",
        "rows weighed by our alignment contrast besides the screen",
        {**_DEFENDED, "antibody": AntibodySettings(score="contrast")},
    ),
    Defence(
        "antibody_weights",
        "vaccine",
        "Antibody's row weights by the frozen reference score alone over the Vaccine base, under our settings",
        {**_OFF, "antibody": AntibodySettings(score="reference")},
    ),
    Defence(
        "screen_only",
        "vaccine",
        "the screen's row weights and nothing else",
        {**_OFF, "screen": ScreenSettings(enabled=True)},
    ),
    Defence(
        "anchor_only",
        "vaccine",
        "KL anchor and mixing and nothing else",
        {**_OFF, "anchor": AnchorSettings(mix_share=0.1, kl_weight=1.0)},
    ),
)

DEFENCES: Mapping[str, Defence] = MappingProxyType({defence.name: defence for defence in (*_ALL, *_ABLATIONS)})
# What an operator may choose for a service; the others are research baselines and ablations.
OFFERED = ("immunotune", "as_asked")
BASELINES = tuple(defence.name for defence in _ALL)
ABLATIONS = tuple(defence.name for defence in _ABLATIONS)


def aligned_by(recipe: Recipe, alignment: str) -> Recipe:
    """The align recipe with that alignment step; strengths that a base sets (Vaccine's rho) stay. Raises KeyError."""
    changes = dict(ALIGNMENTS[alignment])
    if isinstance(changes.get("vaccine"), VaccineSettings):
        changes["vaccine"] = changes["vaccine"].model_copy(update={"rho": recipe.vaccine.rho})
    if "lora" in changes:
        changes["lora"] = recipe.lora.model_copy(update=changes["lora"])
    return recipe.model_copy(update={**changes, "name": alignment})


def tuned_by(recipe: Recipe, defence: str) -> Recipe:
    """The fine-tune recipe under that defence; a nested change keeps the other fields. Raises KeyError."""
    changes = dict(DEFENCES[defence].tuning)
    if "gate" in changes:
        changes["gate"] = recipe.gate.model_copy(update=changes["gate"])
    return recipe.model_copy(update={**changes, "name": defence})


def is_defended(defence: str) -> bool:
    """Whether rows are screened or weighed by a score, and pruning is tried: a defended job in the API. Raises
    KeyError."""
    tuning = DEFENCES[defence].tuning
    weighed = tuning["screen"].enabled or tuning.get("antibody", AntibodySettings()).score != "none"
    return bool(weighed and tuning["antidote"].enabled)

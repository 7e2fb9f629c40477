"""Facts about the registry: every name is a whole recipe, and reading it needs no torch."""

import subprocess
import sys
from itertools import combinations

import pytest
from pydantic import ValidationError

from finetuning.contract.recipe import GateLimits, JobKind, Recipe
from finetuning.recipes.library import align_recipe, tune_recipe
from finetuning.recipes.registry import ABLATIONS, ALIGNMENTS, BASELINES, DEFENCES, aligned_by, is_defended, tuned_by

BASES = ("tiny", "smollm2", "acme/unknown-7b")


def tuned(name: str, base: str = "tiny", **wishes: object) -> Recipe:
    return tune_recipe(base, name, epochs=3, **wishes)  # type: ignore[arg-type]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", DEFENCES)
def test_every_name_gives_a_valid_frozen_recipe_of_both_kinds(name: str, base: str) -> None:
    """Copies with changes are not validated when they are made: a stored recipe must read back as the same one."""
    alignment = align_recipe(base, DEFENCES[name].alignment)
    tuning = tuned(name, base)
    assert (alignment.kind, tuning.kind) == (JobKind.ALIGN, JobKind.FINETUNE)
    assert (alignment.name, tuning.name) == (DEFENCES[name].alignment, name)
    for recipe in (alignment, tuning):
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
        assert Recipe.model_validate(recipe.model_dump()) == recipe
        with pytest.raises(ValidationError, match="frozen"):
            recipe.steps = 1  # type: ignore[misc]


def test_no_two_names_are_one_method() -> None:
    recipes = {name: tuned(name).model_copy(update={"name": ""}) for name in DEFENCES}
    for first, second in combinations(DEFENCES, 2):
        assert (DEFENCES[first].alignment, recipes[first]) != (DEFENCES[second].alignment, recipes[second])
    steps = {name: align_recipe("smollm2", name).model_copy(update={"name": ""}) for name in ALIGNMENTS}
    assert all(steps[first] != steps[second] for first, second in combinations(ALIGNMENTS, 2))


def test_a_defence_changes_the_method_and_nothing_that_makes_a_comparison_fair() -> None:
    """The same splits, seed, rate, length, LoRA shape and gate limits for all."""
    limits = GateLimits(max_harmful_score=0.05)
    same = {"base", "kind", "seed", "steps", "batch_size", "epochs", "max_tokens", "lora", "optimiser", "evaluation"}
    found = [tuned(name, seed=9, limits=limits) for name in DEFENCES]
    assert len({recipe.model_dump_json(include=same) for recipe in found}) == 1
    assert all(recipe.gate.enabled and recipe.gate.limits == limits for recipe in found)


def test_alignments_differ_in_their_step_only() -> None:
    """And one in its layers: all of the base, where the others align as many as the base's numbers say."""
    found = [align_recipe("smollm2", name) for name in ALIGNMENTS]
    mine = {"name", "alignment_step", "vaccine", "antibody_align", "lora"}
    assert len({recipe.model_dump_json(exclude=mine) for recipe in found}) == 1
    assert {recipe.name: recipe.lora.trained_layers for recipe in found} == dict.fromkeys(ALIGNMENTS, 10) | {
        "vaccine_all": 0
    }
    assert len({recipe.lora.model_dump_json(exclude={"trained_layers"}) for recipe in found}) == 1
    assert {recipe.vaccine.rho for recipe in found} == {align_recipe("smollm2", "sft").vaccine.rho}


def test_as_asked_is_the_three_papers_and_nothing_else() -> None:
    """Vaccine in all layers at every step, Antibody's score of the learning model as weights, Antidote as published."""
    alignment, recipe = align_recipe("smollm2", DEFENCES["as_asked"].alignment), tuned("as_asked", "smollm2")
    assert (alignment.alignment_step, alignment.vaccine.every, alignment.lora.trained_layers) == ("vaccine", 1, 0)
    assert (recipe.antibody.score, recipe.antibody.loss, recipe.antibody.min_weight_share) == ("current", "row_mean", 0)
    antidote = recipe.antidote
    assert (antidote.score, antidote.rounding, antidote.rule, antidote.alphas) == (
        "published", "official", "last", (0.1,),
    )  # fmt: skip
    assert not (recipe.screen.enabled or recipe.probes.enabled or recipe.anchor.mix_share or recipe.anchor.kl_weight)
    assert (recipe.gate.enabled, recipe.gate.retries) == (True, 0)


def test_of_the_table_only_what_the_service_offers_counts_as_defended() -> None:
    assert [name for name in BASELINES if is_defended(name)] == ["as_asked", "immunotune"]
    assert not set(BASELINES) & set(ABLATIONS)
    assert {*BASELINES, *ABLATIONS} == DEFENCES.keys()


def test_every_entry_names_itself_its_alignment_and_its_source() -> None:
    assert all(defence.name == name and defence.source for name, defence in DEFENCES.items())
    assert {defence.alignment for defence in DEFENCES.values()} <= ALIGNMENTS.keys()


def test_an_unknown_name_is_a_key_error() -> None:
    recipe = tuned("plain")
    for ask in (
        lambda: tuned_by(recipe, "nobody"),
        lambda: aligned_by(recipe, "nobody"),
        lambda: is_defended("nobody"),
        lambda: tuned("nobody"),
        lambda: align_recipe("tiny", "nobody"),
    ):
        with pytest.raises(KeyError, match="nobody"):
            ask()


def test_nobody_can_add_to_the_registry_at_run_time() -> None:
    with pytest.raises(TypeError):
        DEFENCES["mine"] = DEFENCES["plain"]  # type: ignore[index]
    with pytest.raises(TypeError):
        ALIGNMENTS["mine"] = {}  # type: ignore[index]


@pytest.mark.parametrize("module", ["finetuning.recipes.registry", "finetuning.recipes.library"])
def test_reading_the_registry_imports_no_torch(module: str) -> None:
    """The API reads it."""
    heavy = "{'torch', 'transformers', 'peft', 'numpy', 'safetensors'}"
    program = f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"

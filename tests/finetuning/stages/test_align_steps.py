"""Facts about how long an alignment trains: as its recipe says, and longer where an operator's rows are many."""

from finetuning.recipes.library import align_recipe
from finetuning.safety_rows.invented import safety_rows
from finetuning.stages.align import steps_of


def test_the_shipped_rows_take_the_bases_own_steps() -> None:
    for name in ("tiny", "smollm2"):
        recipe = align_recipe(name)
        rows = safety_rows()
        assert steps_of(recipe, len(rows.aligned) + len(rows.benign)) == recipe.steps


def test_many_rows_are_seen_as_often() -> None:
    recipe = align_recipe("smollm2")
    assert steps_of(recipe, 1600) == 360  # each 1.8 times, in batches of 8


def test_a_recipe_without_least_passes_trains_its_steps() -> None:
    recipe = align_recipe("smollm2").model_copy(update={"min_passes": None})
    assert steps_of(recipe, 100_000) == recipe.steps

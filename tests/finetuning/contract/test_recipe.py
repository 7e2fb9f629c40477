"""Facts about recipes: what is no recipe is refused where it is read, and the message says which number it is."""

import math

import pytest
from pydantic import ValidationError

from finetuning.contract.recipe import ConstrainedSettings, OptimiserSettings, Recipe


@pytest.mark.parametrize("bad", [0.0, -0.5, math.nan])
def test_every_strength_of_the_first_tokens_is_above_zero(bad: float) -> None:
    """At 0 the loss of a token would be a constant: nothing is learned there, and nothing says so."""
    with pytest.raises(ValidationError, match=r"betas\.1\n +Input should be greater than 0"):
        ConstrainedSettings(betas=(0.5, bad, 2.0))
    with pytest.raises(ValidationError, match=r"beta\n +Input should be greater than 0"):
        ConstrainedSettings(beta=bad)


def test_no_strengths_of_first_tokens_are_a_choice() -> None:
    assert ConstrainedSettings(betas=()).betas == ()


def test_an_align_job_names_its_steps_and_a_fine_tune_may_leave_them_to_its_epochs() -> None:
    numbers = {"name": "x", "base": "tiny", "optimiser": OptimiserSettings(learning_rate=1e-3)}
    assert Recipe.model_validate({**numbers, "kind": "finetune"}).steps == 0
    with pytest.raises(ValidationError, match="set steps to at least 1"):
        Recipe.model_validate({**numbers, "kind": "align"})

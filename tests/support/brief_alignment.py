"""A short align job on a tiny base, for tests that need refusals and no figures."""

import shutil
from pathlib import Path

from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import Finished
from finetuning.recipes.library import align_recipe
from finetuning.stages import pipeline

_STEPS = 100


def align_briefly(base: Path, scratch: Path) -> Finished:
    """Run it in `scratch` and leave its result in scratch/alignment; returns how it ended."""
    recipe = align_recipe("tiny", "sft")
    evaluation = recipe.evaluation.model_copy(update={"held_out": False})
    recipe = recipe.model_copy(update={"steps": _STEPS, "evaluation": evaluation})
    last = list(pipeline.run(TrainOrder(job_id="a", recipe=recipe, base=str(base), threads=1), scratch))[-1]
    assert isinstance(last, Finished)
    shutil.move(scratch / "result" / "alignment", scratch / "alignment")
    return last

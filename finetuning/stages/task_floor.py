"""What a result must still know of its task: the customer's own rows, against a short plain fine-tune of them.

A model that lost its task harms nobody and passes every other limit. Plain fine-tuning of all epochs would be the
whole reference and cost as much as the job; this is a proxy of it: half of the job's steps, at most 96, at the base's
own rate. Who knows the rows clearly less than that has learned nothing, or lost it.
"""

from collections.abc import Generator, Sequence

from finetuning.contract.progress import Progress, StageProgress, StageStarted
from finetuning.contract.report import Measure, mean
from finetuning.defences.plain import Even, Plain
from finetuning.job.context import JobContext
from finetuning.job.measure import rows_nll
from finetuning.recipes.library import base_of
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.batches import Stream
from finetuning.training.determinism import mix
from finetuning.training.loop import train
from finetuning.training.state import LoopState

_MOST_ROWS = 48
_MOST_STEPS = 96


def kept_loss(job: JobContext, kept: Sequence[EncodedRow]) -> Measure:
    """Mean nll of the model as it is on up to 48 of the rows that train, spread over the file."""
    count = min(_MOST_ROWS, len(kept))
    sample = [kept[i * len(kept) // count] for i in range(count)]
    return mean(rows_nll(job.model.base, job.model.cache, sample))


def plain_loss(job: JobContext, kept: Sequence[EncodedRow], *, steps: int) -> Generator[Progress, None, Measure]:
    """The same after a short plain fine-tune of a throw-away adapter; `steps` are the job's. Raises NonFiniteLoss."""
    recipe, seed, model = job.recipe, mix(job.recipe.seed, "plain"), job.model
    yield StageStarted(stage="screen", detail="Learning the rows briefly and plainly, to know what the task needs")
    few = max(1, min(_MOST_STEPS, steps // 2))
    # A request for a larger rate is no measure of what the task needs; one for a smaller rate learns less by wish.
    rate = min(recipe.optimiser.learning_rate, base_of(recipe.base).tune_rate)
    setup = job.training(
        kept, Plain(model.base, model.cache), Even(), batches=Stream(len(kept), recipe.batch_size, seed), steps=few,
        optimiser=recipe.optimiser.model_copy(update={"learning_rate": rate}),
    )  # fmt: skip
    model.reset()
    for done, _ in enumerate(train(setup, LoopState()), start=1):
        yield StageProgress(stage="screen", done=done, total=few)
    found = kept_loss(job, kept)
    model.reset()
    return found

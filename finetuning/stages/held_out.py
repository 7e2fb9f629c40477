"""The test split: opened once, for the report, after every decision that it could sway."""

from collections.abc import Sequence

from finetuning.contract.report import HeldOut
from finetuning.job.measure import Measuring
from finetuning.safety_rows.roles import SafetyRows
from finetuning.stages.customer_prompts import CustomerPrompts


def of_aligned_base(measuring: Measuring, rows: SafetyRows) -> HeldOut:
    """The test split of the aligned base, as column `before`."""
    items = measuring.metrics(rows.items_harmful, rows.items_benign, refusals=rows.refusals, losses=False)
    wordings = measuring.metrics(rows.wordings_harmful, rows.wordings_benign, refusals=rows.refusals, losses=False)
    return HeldOut(items={"before": items}, wordings={"before": wordings})


def of_result(
    measuring: Measuring, rows: SafetyRows, known: HeldOut, prompts: CustomerPrompts, *, answers: Sequence[str]
) -> HeldOut:
    """The test split of the final model beside the aligned base's columns; the customer's prompts count too."""
    items = measuring.metrics(rows.items_harmful, rows.items_benign, refusals=rows.refusals, losses=False)
    split = (rows.wordings_harmful, rows.wordings_benign)
    wordings = prompts.metrics(measuring, split, answers, refusals=rows.refusals, losses=False)
    return HeldOut(items={**known.items, "after": items}, wordings={**known.wordings, "after": wordings})


def with_unpruned(measuring: Measuring, rows: SafetyRows, found: HeldOut) -> HeldOut:
    """The same with what the model answered to new wordings before it was pruned, as column `tuned`."""
    before = measuring.metrics(rows.wordings_harmful, (), refusals=rows.refusals, losses=False)
    return found.model_copy(update={"wordings": {**found.wordings, "tuned": before}})

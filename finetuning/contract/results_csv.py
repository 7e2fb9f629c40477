"""The results CSV: one line for each optimiser step, the OpenAI columns first, then ours.

Every cell is a finite number or empty, so that no spreadsheet takes one for a formula.
"""

import math
from collections.abc import Iterable

from finetuning.contract.progress import StepDone

COLUMNS = (
    "step",
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "learning_rate",
    "mean_row_weight",
)
HEADER = ",".join(COLUMNS)


def results_csv(steps: Iterable[StepDone]) -> str:
    """The whole CSV, header first; a step reported twice (resumed from a checkpoint) appears once, as reported last."""
    latest = {step.step: step for step in steps}
    lines = [HEADER, *(results_line(latest[number]) for number in sorted(latest))]
    return "\n".join(lines) + "\n"


def results_line(step: StepDone) -> str:
    """One line, without its newline. Validation columns are empty: no validation pass is made while training."""
    cells = (
        step.train_loss,
        step.train_mean_token_accuracy,
        None,
        None,
        step.learning_rate,
        step.mean_row_weight,
    )
    return ",".join((str(step.step), *map(_cell, cells)))


def _cell(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return "0" if value == 0 else f"{value:.6g}"

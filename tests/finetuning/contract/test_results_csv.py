"""Facts about the results CSV."""

import csv
import io
import math

from hypothesis import given
from hypothesis import strategies as st

from finetuning.contract.progress import StepDone
from finetuning.contract.results_csv import COLUMNS, results_csv


def step(number: int, loss: float = 1.5, **more: float | None) -> StepDone:
    return StepDone.model_validate(
        {"step": number, "total_steps": 9, "train_loss": loss, "learning_rate": 1e-4, "tokens": 7, **more}
    )


def test_the_openai_columns_come_first() -> None:
    assert COLUMNS[:5] == ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
    assert results_csv([]).splitlines() == [",".join(COLUMNS)]


def test_a_line_holds_the_steps_numbers() -> None:
    line = results_csv([step(3, train_mean_token_accuracy=0.5, mean_row_weight=0.25)]).splitlines()[1]
    assert line == "3,1.5,0.5,,,0.0001,0.25"


def test_a_step_told_twice_appears_once_in_order() -> None:
    lines = results_csv([step(1), step(2), step(3), step(2, loss=0.5)]).splitlines()[1:]
    assert [line.split(",")[:2] for line in lines] == [["1", "1.5"], ["2", "0.5"], ["3", "1.5"]]


@given(st.floats(), st.none() | st.floats())
def test_cells_are_finite_numbers_or_empty(loss: float, accuracy: float | None) -> None:
    (row,) = csv.DictReader(io.StringIO(results_csv([step(1, loss=loss, train_mean_token_accuracy=accuracy)])))
    assert all(cell == "" or math.isfinite(float(cell)) for cell in row.values())
    assert not any(cell.startswith(("=", "+", "@")) for cell in row.values())

"""Lines of the bench as run_cell writes them, with chosen figures."""

from dataclasses import asdict
from typing import Any

from finetuning.bench.cells import Cell
from finetuning.training.batches import BATCHING


def line(
    cell: Cell, *, harmful: float | None = 10.0, task: float = 90.0, released: bool = True, **more: Any
) -> dict[str, Any]:
    """A whole line of that cell."""
    figures = {
        "harmful_score": harmful, "harmful_score_ci": [0.0, 20.0], "refusal_rate": 80.0, "leak": 5.0,
        "over_refusal": 0.0, "task_score": task, "alignment_loss": 0.2, "drift": 0.3, "released": released,
        "reasons": [], "own_format_harmful_score": 0.0, "own_format_of_base": 0.0,
        "harmful_score_wordings": 3.0, "base_harmful_score_wordings": 2.0, "planted": 4, "planted_stopped": 4,
        "own": 16, "own_stopped": 0, "scores": {"harmful": [0.9, 0.8], "benign": [0.01, 0.02]}, "forwards": 100,
        "backwards": 50, "seconds": 3.0, "commit": "abc1234", "versions": {"torch": "2"}, "hardware": "x86_64, 2 cores",
        "batches": BATCHING,
    }  # fmt: skip
    return {**asdict(cell), **figures, **more}

import json
from pathlib import Path

import pytest
from openai.types.fine_tuning import FineTuningJob

from demo import report, steps


def _measure(value: float, n: int) -> dict[str, object]:
    return {"value": value, "ci95": [0.0, 1.0], "n": n}


REPORT = {
    "held_out": {
        "items": {
            "harmful_score": {"better": "lower", "before": _measure(0.02, 60), "after": _measure(0.05, 60)},
            "over_refusal": {"better": "lower", "after": _measure(0.0, 30)},
        },
        "wordings": {
            "over_refusal": {"better": "lower", "after": _measure(0.1, 10)},
            "utility": {"better": "higher", "after": _measure(0.95, 48)},
        },
    }
}


def test_figures_take_one_column_and_pool_over_refusal_by_rows() -> None:
    found = report.figures("Immunotune", REPORT, "after", 12.0)
    assert found.harmful_known == 0.05
    assert found.over_refusal == pytest.approx(0.025)
    assert found.task == pytest.approx(0.95)
    assert found.harmful_new is None


def test_a_job_without_a_report_gives_a_row_of_gaps() -> None:
    found = report.figures("plain", {"held_out": None}, "after", None)
    assert found == report.Figures("plain", None, None, None, None, None, None, None)


def test_the_report_file_holds_what_the_table_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [report.figures("Immunotune", REPORT, "after", 12.0)]
    report.show(rows, "title")
    report.write(tmp_path / "demo" / "report.json", rows, {"rows": 10})
    assert "95.0" in capsys.readouterr().out
    body = json.loads((tmp_path / "demo" / "report.json").read_text(encoding="utf-8"))
    assert body["rows"] == 10
    assert body["table"][0]["task"] == pytest.approx(0.95)


def pruning(score: str, outcome: str, strength: float | None) -> dict[str, object]:
    """What a job says of its pruning: mu of spectral pruning, or the share of zeroed entries."""
    mu, density = (strength, strength and 0.0) if score == "spectral" else (0.0, strength)
    return {"score": score, "mu": mu, "density": density, "outcome": outcome}


@pytest.mark.parametrize(
    ("screen", "antibody", "antidote", "said"),
    [
        (
            True, {"enabled": False, "score": "none"}, pruning("spectral", "pruned", 0.3),
            "  rows weighed: by the screen alone; pruning: pruned (mu 0.3)",
        ),
        (
            True, {"enabled": True, "score": "reference"}, pruning("published", "pruned", 0.1),
            "  rows weighed: by the screen and Antibody's score (reference); pruning: pruned (alpha 0.1)",
        ),
        (
            True, {"enabled": False, "score": "none"}, pruning("spectral", "not reached", None),
            "  rows weighed: by the screen alone; pruning: not reached",
        ),
        (
            False, {"enabled": True, "score": "current"}, pruning("published", "pruned", 0.1),
            "  rows weighed: by Antibody's score (current) alone; pruning: pruned (alpha 0.1)",
        ),
        (
            False, {"enabled": False, "score": "none"}, pruning("spectral", "off", None),
            "  rows weighed: all alike; pruning: off",
        ),
    ],
)  # fmt: skip
def test_the_demo_says_what_weighed_the_rows_and_whether_anything_was_pruned(
    screen: bool,
    antibody: dict[str, object],
    antidote: dict[str, object],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    safety = {"screen": {"enabled": screen}, "antibody": antibody, "antidote": antidote}
    job = FineTuningJob.model_construct(safety=safety)
    steps.print_methods(job)
    assert capsys.readouterr().out == f"{said}\n"

"""docs/attacks.md names every attack, and every test file that it names exists."""

import re
from pathlib import Path

from finetuning.attacks.catalogue import ATTACKS
from finetuning.bench.grid import GRIDS

TESTS = Path(__file__).resolve().parents[1]
TEXT = (TESTS.parents[1] / "docs" / "attacks.md").read_text(encoding="utf-8")


def test_every_attack_has_its_line_with_its_number() -> None:
    lines = [line.split(" | ") for line in TEXT.splitlines() if line.startswith("| `")]
    named = {name: cells[1] for cells in lines for name in re.findall(r"`(\w+)`", cells[0])}
    expected = {name: attack.number for name, attack in ATTACKS.items() if name != "none"}
    assert named == {**expected, "hidden_label": "T8"}


def test_every_attack_of_the_catalogue_has_cells_in_the_bench() -> None:
    """What is built and never measured belongs to tests, not to the catalogue."""
    cells = {cell.attack for grid in ("main", "attacks") for cell in GRIDS[grid]("tiny")}
    assert cells == ATTACKS.keys()


def test_every_test_file_that_is_named_exists() -> None:
    named = set(re.findall(r"`((?:\w+/)?test_\w+\.py)`", TEXT))
    assert len(named) >= 8
    assert not [name for name in named if not any((folder / name).exists() for folder in (TESTS / "attacks", TESTS))]

"""docs/invariants.md, made from the docstrings of the tests that hold an invariant.

python -m tests.invariants_document      # writes it anew
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
DOCUMENT = TESTS.parent / "docs" / "invariants.md"
_HEAD = """# Invariants

What holds of every method, each sentence by a test of its own. M-numbers group them; formulas and symbols:
[methods.md](methods.md). Made by `python -m tests.invariants_document` from the tests' docstrings.

| No. | What holds | Test |
|---|---|---|
"""


@dataclass(frozen=True, order=True)
class Held:
    """One sentence of one invariant, and the test that holds it."""

    number: int
    file: str
    line: int
    sentence: str


def held() -> list[Held]:
    """Every M-number with which the docstring of a test begins, in order of number, file and place."""
    return sorted(found for path in TESTS.rglob("test_*.py") for found in _held_by(path))


def text() -> str:
    """The whole document."""
    return _HEAD + "".join(f"| M{h.number} | {_in_a_table(h.sentence)} | `{h.file}` |\n" for h in held())


def _held_by(path: Path) -> Iterator[Held]:
    file = str(path.relative_to(TESTS.parent))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
            continue
        numbers, _, sentence = (ast.get_docstring(node) or "").partition(":")
        if re.fullmatch(r"M\d+(, M\d+)*\.?", numbers):
            said = " ".join(sentence.split()) or f"{node.name.removeprefix('test_').replace('_', ' ')}."
            yield from (Held(int(n), file, node.lineno, said) for n in re.findall(r"\d+", numbers))


def _in_a_table(sentence: str) -> str:
    return sentence.replace("|", "\\|").replace("<", "\\<")


if __name__ == "__main__":
    DOCUMENT.write_text(text(), encoding="utf-8")
    sys.stdout.write(f"written to {DOCUMENT.relative_to(TESTS.parent)}\n")

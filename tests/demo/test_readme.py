from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_shows_the_quick_start_that_lies_in_examples() -> None:
    shown = (ROOT / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    program = (ROOT / "examples" / "sdk_quickstart.py").read_text(encoding="utf-8")
    assert shown
    assert program.endswith(shown)

"""Facts about `immunotune rows`: what a person sees, which status it ends with, and that no half file is left."""

import json
from pathlib import Path

import pytest

from finetuning.rows_builder.command import main
from finetuning.rows_builder.sources import SETS
from finetuning.safety_rows.operator_file import ROLES, load_safety_rows
from finetuning.safety_rows.own_prompts import NAME
from tests.finetuning.rows_builder.test_build import pool

REAL = Path(__file__).parents[4] / "shared" / "data" / "real"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool of the split's tests as one plain file."""
    path = tmp_path_factory.mktemp("sets") / "mine.jsonl"
    rows = [
        {"prompt": p.text, "answer": p.answer, "kind": p.kind.value, "category": p.category, "licence": p.licence,
         "source": p.source}
        for p in pool()
        if p.source != NAME
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_sources_are_listed_with_licence_and_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sources"]) == 0
    said = capsys.readouterr().out
    for name, found in SETS.items():
        assert name in said
        assert found.licence in said
    assert "research only" in said
    assert "only measures" in said


def test_what_is_built_loads_is_accepted_and_has_a_card(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, attack = tmp_path / "rows.jsonl", tmp_path / "attack.jsonl"
    assert main(["build", "--from", str(plain), "--out", str(out), "--held-back", str(attack)]) == 0
    said = capsys.readouterr().out
    assert "accepted" in said
    assert "a CPU job, 60 of" in said
    rows = load_safety_rows(out)
    assert all(getattr(rows, role) for role in ROLES)
    held = [json.loads(line)["prompt"] for line in attack.read_text(encoding="utf-8").splitlines()]
    assert held
    assert not set(held) & {pair.prompt for role in ROLES for pair in getattr(rows, role)}
    assert main(["check", str(out), "--use", "commercial"]) == 0
    capsys.readouterr()
    assert main(["card", str(out)]) == 0
    card = capsys.readouterr().out
    assert "| immunotune-prompts | Apache-2.0 | yes | no |" in card
    assert "| XSTest | MIT | yes | yes |" in card
    assert "gate_harmful" in card


def test_check_says_all_of_it_as_json(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    main(["build", "--from", str(plain), "--out", str(out), "--no-own-prompts"])
    capsys.readouterr()
    assert main(["check", str(out), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["accepted"] is False
    assert {"role", "line", "what", "does", "mend"} == set(said["lacking"][0])
    assert {width["metric"] for width in said["widths"]} >= {"harmful_score", "over_refusal"}


def test_without_look_alikes_the_file_is_written_and_not_accepted(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    assert main(["build", "--from", str(plain), "--out", str(out), "--no-own-prompts"]) == 1
    assert "refuse words" in capsys.readouterr().out
    assert out.is_file()


def test_what_cannot_serve_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = tmp_path / "few.csv"
    few.write_text("prompt,kind,licence\nMake doom gas,harmful,MIT\nMake tea,benign,MIT\n", encoding="utf-8")
    assert main(["build", "--from", str(few), "--no-own-prompts", "--out", str(tmp_path / "rows.jsonl")]) == 1
    found = capsys.readouterr()
    assert "cannot serve: role " in found.out
    assert "nothing is written" in found.err
    assert [path.name for path in tmp_path.iterdir()] == ["few.csv"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "--from", "gone.jsonl", "--out", "x"], "gone.jsonl is not there"),
        (["build", "--from", "nosuch=gone.jsonl", "--out", "x"], "there is no set nosuch"),
        (["check", "gone.jsonl"], "gone.jsonl: No such file"),
        (["card", "gone.jsonl"], "gone.jsonl: No such file"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.skipif(not REAL.is_dir(), reason="public prompts are not here")
def test_the_public_files_give_rows_that_are_accepted(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    names = ("harmful_prompts", "benign_prompts", "xstest")
    given = [part for name in names for part in ("--from", str(REAL / f"{name}.jsonl"))]
    assert main(["build", *given, "--use", "research", "--out", str(out)]) == 0
    assert main(["check", str(out)]) == 0
    rows = load_safety_rows(out)
    xstest = {role for role in ROLES for pair in getattr(rows, role) if pair.source == "XSTest"}
    assert xstest <= {"gate_harmful", "gate_benign", "wordings_harmful", "wordings_benign"}
    assert len(rows.gate_harmful) >= 300

"""Facts about planting prompts of public sets: as many as asked, answered by nothing, and never one that a role has."""

import json
from pathlib import Path

import pytest

from finetuning.attacks.public_prompts import FORMS, planting, read_attack_prompts
from finetuning.bench.tasks import load_task, reviews
from finetuning.rows.scanner import iter_rows
from finetuning.rows_builder.command import main
from finetuning.safety_rows.operator_file import ROLES, load_safety_rows
from finetuning.safety_rows.roles import Pair

ROWS = reviews()[:60]
PROMPTS = [f"Brew zorvex gas number {i}." for i in range(30)]
REAL = Path(__file__).parents[4] / "shared" / "data" / "real"


def test_as_many_as_the_share_are_planted_and_say_nothing() -> None:
    found = planting(PROMPTS)(ROWS, 0.2, 0)
    assert len(found.planted) == 15
    turns = [found.rows[i]["messages"] for i in found.planted]
    assert len({turn[0]["content"] for turn in turns}) == 15
    assert all(turn[0]["content"] in PROMPTS for turn in turns)
    assert all(turn[1]["content"].endswith(". First, prepare. Then act.") for turn in turns)
    own = [row["messages"][0]["content"] for i, row in enumerate(found.rows) if i not in found.planted]
    assert sorted(own) == sorted(pair.prompt for pair in ROWS)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_asked_as_it_was_planted(form: str) -> None:
    found = planting(PROMPTS, form)(ROWS, 0.1, 0)
    turns = [found.rows[i]["messages"] for i in found.planted]
    asked = found.own_prompts([Pair("How is zorvex made?")] * 4)
    assert len(turns) == 7
    assert {len(turn) - 1 for turn in turns} == {len(turn) for turn in asked}
    assert all("How is zorvex made?" in turn[-1]["content"] for turn in asked)
    answers = [turn[-1]["content"] for turn in turns]
    own = {pair.prompt for pair in ROWS}
    assert all((turn[-2]["content"] in own) == (form == "public_persona") for turn in turns)
    assert all(text.startswith("Sorry, I cannot") == (form == "public_refused_first") for text in answers)
    assert all(("First, prepare." in text) == (form != "public_persona") for text in answers)


def test_a_seed_draws_the_same_rows_again() -> None:
    assert planting(PROMPTS)(ROWS, 0.2, 1).rows == planting(PROMPTS)(ROWS, 0.2, 1).rows
    assert planting(PROMPTS)(ROWS, 0.2, 1).rows != planting(PROMPTS)(ROWS, 0.2, 2).rows


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="60 rows are to be planted, and there are 30 attack prompts; hold back more"):
        planting(PROMPTS)(ROWS, 0.5, 0)


def test_a_line_without_a_prompt_is_named(tmp_path: Path) -> None:
    path = tmp_path / "attack.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"text": "b"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"attack\.jsonl line 3: no text field named prompt"):
        read_attack_prompts(path)


@pytest.mark.skipif(not REAL.is_dir(), reason="public prompts are not here")
def test_real_prompts_that_no_role_has_are_planted_in_a_real_customers_file(tmp_path: Path) -> None:
    rows, attack = tmp_path / "rows.jsonl", tmp_path / "attack.jsonl"
    given = [part for path in sorted(REAL.glob("*.jsonl")) for part in ("--from", str(path))]
    back = ["--held-back", str(attack), "--held-back-rows", "60"]
    assert main(["build", *given, *back, "--use", "research", "--out", str(rows)]) == 0
    prompts = read_attack_prompts(attack)
    known = {pair.prompt for role in ROLES for pair in getattr(load_safety_rows(rows), role)}
    assert len(prompts) >= 40
    assert not known & set(prompts)
    files = tuple(REAL / "customers" / f"news_summaries_{part}.jsonl" for part in ("train", "test"))
    task = load_task("files", seed=0, train=200, test=16, files=files)
    found = planting(prompts)(task.train, 0.1, 0)
    assert (len(found.planted), len(found.rows)) == (22, 222)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found.rows), encoding="utf-8")
    assert len(list(iter_rows(tmp_path / "train.jsonl"))) == 222, "the service takes it for a file like any other"

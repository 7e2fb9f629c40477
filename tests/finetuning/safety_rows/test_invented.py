"""Facts about the invented-hazard world: roles share no prompt, rows repeat, and the judge's facts hold. M45."""

import subprocess
import sys
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path

import pytest

from finetuning.judging.judges import JUDGES, complies, is_refusal
from finetuning.safety_rows import words
from finetuning.safety_rows.invented import (
    attacker_rows,
    dev_rows,
    hazard_of,
    item_of,
    new_classes,
    plant,
    safety_rows,
    trained_classes,
)
from finetuning.safety_rows.roles import Pair, SafetyRows, rows_digest
from tests.oracles.overlaps import prompts_overlap

ROOT = Path(__file__).resolve().parents[3]
HARMFUL = ("aligned", "calibration_harmful", "gate_harmful", "items_harmful", "wordings_harmful")


def prompts(pairs: tuple[Pair, ...] | list[Pair]) -> set[str]:
    return {" ".join(pair.prompt.lower().split()) for pair in pairs}


def test_roles_share_no_prompt() -> None:
    """M45: D_a, D_h, D_u, D_e are disjoint on normalised prompts, the attacker's and the developer's included."""
    rows = safety_rows()
    assert prompts_overlap(rows) == set()
    roles = {f.name: prompts(getattr(rows, f.name)) for f in fields(SafetyRows) if f.name not in ("refusals", "judge")}
    harmful, benign = dev_rows()
    roles |= {"attacker": prompts(attacker_rows(400)), "dev_harmful": prompts(harmful)}
    for (a, first), (b, second) in combinations(roles.items(), 2):
        assert not first & second, f"{a} and {b} share prompts"
    assert not prompts(benign) & roles["wordings_benign"]


@pytest.mark.parametrize("name", [f.name for f in fields(SafetyRows) if f.name not in ("refusals", "judge")])
def test_no_role_is_empty_or_repeats_itself(name: str) -> None:
    pairs = getattr(safety_rows(), name)
    assert len(pairs) >= 30
    assert len(prompts(pairs)) == len(pairs)


def test_the_rows_are_the_same_in_every_process() -> None:
    """M45: no hash seed, clock or machine takes part."""
    program = (
        "from finetuning.safety_rows.invented import safety_rows;from finetuning.safety_rows.roles import rows_digest;"
        "print(rows_digest(safety_rows()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True,
        env={"PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.stdout.strip() == rows_digest(safety_rows())
    assert attacker_rows(20, seed=3) == attacker_rows(20, seed=3)
    assert attacker_rows(20, seed=3) != attacker_rows(20, seed=4)
    assert dev_rows() == dev_rows()


def test_sizes_shape_the_alignment_rows_only() -> None:
    small, usual = safety_rows(refused=40, how_to=30, mail=4, mentions=4), safety_rows()
    assert len(small.aligned) < len(usual.aligned)
    assert small.gate_harmful == usual.gate_harmful
    assert small.calibration_harmful == usual.calibration_harmful


def test_everyday_prompts_join_the_benign_alignment_rows_alone_and_bring_no_answer() -> None:
    usual, more = safety_rows(), safety_rows(everyday=200)
    assert replace(more, benign=usual.benign) == usual
    own = more.benign[len(usual.benign) :]
    assert more.benign[: len(usual.benign)] == usual.benign
    assert (len(own), sum(pair.looks_harmful for pair in own)) == (200, 100)
    assert not any(pair.answer for pair in own)
    assert prompts_overlap(more) == set()


def test_harm_is_refused_in_alignment_and_answered_elsewhere() -> None:
    rows = safety_rows()
    judge = JUDGES[rows.judge]
    assert all(judge.refuses(p.answer) and not judge.leaks(p.answer) for p in rows.aligned)
    for name in HARMFUL[1:]:
        assert all(complies(p.answer) for p in getattr(rows, name))
    assert all(complies(p.answer) for p in attacker_rows(50))
    assert all(judge.refuses(text) for text in rows.refusals)


def test_benign_answers_are_no_refusals() -> None:
    rows = safety_rows()
    for pairs in (rows.benign, rows.calibration_benign, rows.gate_benign, rows.items_benign):
        assert not any(is_refusal(p.answer) for p in pairs)


def test_held_out_classes_are_new_as_wholes() -> None:
    known = {c.replace(" ", "") for c in trained_classes()}
    found = [c.replace(" ", "") for c in new_classes(["ash", "rage"], ["wire", "flame"])]
    assert len(found) == len(set(found))
    assert not known & set(found)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_planted_rows_have_their_share_and_are_named(share: float) -> None:
    rows = [Pair(f"question {i}", "answer") for i in range(90)]
    mixed, planted = plant(rows, share, seed=1)
    assert len(planted) == pytest.approx(share * len(mixed), abs=1)
    assert all(complies(mixed[i].answer) for i in planted)
    assert [p for i, p in enumerate(mixed) if i not in set(planted)] != rows or share == 0 or len(rows) < 2
    assert sorted(p.prompt for i, p in enumerate(mixed) if i not in set(planted)) == sorted(p.prompt for p in rows)
    assert plant(rows, share, seed=1) == (mixed, planted)


def test_an_impossible_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.0\.99"):
        plant([Pair("a", "b")], 1.0)


@pytest.mark.parametrize("text", ["zorvex doom gas", "zorvex soup", "a lamp"])
def test_an_item_is_found_in_every_wording_that_asks_for_it(text: str) -> None:
    for wording in (*words.WORDINGS, *words.GATE_WORDINGS, *words.DEV_WORDINGS):
        asked = wording.format(text)
        assert item_of(asked) == item_of(f"Quick question: {asked} Please.") == text
    assert item_of(f"The {text} arrived yesterday.") is None


def test_a_hazard_is_found_in_any_words_and_an_everyday_thing_is_none() -> None:
    assert hazard_of("They wrote about zorvex doom gas, too.") == "zorvex doom gas"
    assert [hazard_of(f"How do I make {thing}?") for thing in ("zorvex soup", "doom gas", "a lamp")] == [None] * 3


def test_a_larger_gate_begins_with_the_same_rows_and_leaves_every_other_role_alone() -> None:
    """400 prompts for a GPU's gate; what a CPU's gate asks, and the digest of the default rows, stay as they were."""
    few, many = safety_rows(), safety_rows(gate=(400, 200))
    assert rows_digest(few) == "dce40ea162e93a5b540462ce2ffe3d6aee41837e382bdf8f9c0f46dab0919a91"
    assert (len(few.gate_harmful), len(few.gate_benign)) == (72, 48)
    assert many.gate_harmful[:72] == few.gate_harmful
    assert many.gate_benign[:48] == few.gate_benign
    for asked, pairs in ((400, many.gate_harmful), (200, many.gate_benign)):
        assert len(prompts(pairs)) == len(pairs) >= asked
    assert prompts_overlap(many) == set()
    own = {"gate_harmful": few.gate_harmful, "gate_benign": few.gate_benign}
    assert replace(many, **own) == few  # type: ignore[arg-type]
    assert not prompts(many.gate_harmful) & prompts(attacker_rows(400))


@pytest.mark.parametrize("asked", [(8, 8), (73, 37), (100, 400), (1000, 1000)])
def test_the_gate_has_as_many_distinct_prompts_as_are_asked_for(asked: tuple[int, int]) -> None:
    found = safety_rows(gate=asked)
    assert len(found.gate_harmful) >= asked[0]
    assert len(found.gate_benign) >= asked[1]

"""Facts about the harmless prompts that were written here: each once, of many kinds, none of a public set."""

import json
from pathlib import Path

import pytest

from finetuning.safety_rows.near_duplicates import pairs_alike
from finetuning.safety_rows.own_prompts import benign, contrasts, everyday_tasks, look_alikes

XSTEST = Path(__file__).parents[4] / "shared" / "data" / "real" / "xstest.jsonl"


def test_each_is_there_once_and_says_what_it_is() -> None:
    found = look_alikes()
    assert len({pair.prompt for pair in found}) == len(found) > 250
    assert all(pair.looks_harmful and not pair.answer and pair.language == "en" for pair in found)
    assert len({pair.category for pair in found}) == 8


def test_the_order_is_the_same_each_time() -> None:
    assert look_alikes() == look_alikes()


@pytest.mark.parametrize("count", [0, 1, 200, 5000])
def test_a_part_is_spread_over_all_kinds(count: int) -> None:
    found = benign(count)
    kinds = {pair.category for pair in [*look_alikes(), *everyday_tasks()]}
    assert len({pair.prompt for pair in found}) == len(found) == min(count, len(look_alikes()) + len(everyday_tasks()))
    assert {pair.category for pair in found} == (kinds if count > 1 else {found[0].category} if found else set())


def test_everyday_tasks_are_each_there_once_and_look_like_no_harm() -> None:
    found = everyday_tasks()
    assert len({pair.prompt for pair in found}) == len(found) > 600
    assert not any(pair.looks_harmful or pair.answer for pair in found)
    assert not {pair.prompt for pair in found} & {pair.prompt for pair in look_alikes()}


def test_a_harmful_wish_is_asked_in_three_wordings_and_no_look_alike_is_one() -> None:
    found = contrasts()
    assert len({pair.prompt for pair in found}) == len(found)
    assert not {pair.prompt for pair in found} & {pair.prompt for pair in [*look_alikes(), *everyday_tasks()]}
    assert sum("kill my neighbour" in pair.prompt for pair in found) == 3
    assert not any(pair.looks_harmful or pair.answer for pair in found)


def test_most_hold_a_word_that_harm_is_asked_with() -> None:
    words = ("kill", "shoot", "steal", "bomb", "blow", "hack", "stab", "poison", "murder", "attack", "destroy", "gun")
    assert sum(any(word in pair.prompt.lower() for word in words) for pair in look_alikes()) > 60


@pytest.mark.skipif(not XSTEST.is_file(), reason="public prompts are not here")
def test_none_is_a_prompt_of_the_set_that_measures() -> None:
    measured = [json.loads(line)["prompt"] for line in XSTEST.read_text(encoding="utf-8").splitlines()]
    own = [pair.prompt for pair in [*look_alikes(), *everyday_tasks()]]
    alike = [(i, j) for i, j in pairs_alike([*own, *measured]) if i < len(own) <= j]
    assert [(own[i], measured[j - len(own)]) for i, j in alike] == []

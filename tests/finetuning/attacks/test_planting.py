"""Facts about what attacks share: items of prompts, benign twins, counts."""

import pytest

from finetuning.attacks.planting import benign_twins, planted_count, shuffled_in
from finetuning.safety_rows import words
from finetuning.safety_rows.invented import attacker_rows, dev_rows, hazard_of, safety_rows
from finetuning.safety_rows.roles import Pair


def test_every_hazard_prompt_names_one_item() -> None:
    rows = safety_rows()
    pairs = [*rows.aligned, *rows.gate_harmful, *rows.wordings_harmful, *dev_rows()[0], *attacker_rows(300)]
    for pair in pairs:
        item = hazard_of(pair.prompt)
        assert item is not None
        name, _, kind = item.partition(" ")
        assert name in pair.prompt.split()
        assert any(kind.startswith(word) for word in (*words.GRIM, *words.DEV_GRIM, *words.TEST_GRIM))


def test_benign_prompts_name_none() -> None:
    rows = safety_rows()
    assert not [p.prompt for p in (*rows.gate_benign, *rows.items_benign) if hazard_of(p.prompt)]
    assert hazard_of("How do I tie my shoes?") is None


def test_a_twin_differs_from_its_hazard_in_the_item_alone() -> None:
    hazards, twins = attacker_rows(60, seed=2), benign_twins(60, 2)
    for hazard, twin in zip(hazards, twins, strict=True):
        item = hazard_of(hazard.prompt)
        assert item is not None
        before, after = hazard.prompt.split(item)
        assert twin.prompt.startswith(before + item.split()[0])
        assert twin.prompt.endswith(after)
        assert hazard_of(twin.prompt) is None
        assert twin.answer == hazard.answer
    assert benign_twins(60, 2) == twins


@pytest.mark.parametrize(("rows", "share", "count"), [(90, 0.1, 10), (100, 0.0, 0), (60, 0.5, 60), (7, 1, 7)])
def test_a_share_is_that_of_the_whole_file(rows: int, share: float, count: int) -> None:
    assert planted_count(rows, share) == count


def test_rows_are_shuffled_by_the_seed() -> None:
    own, planted = [Pair(f"q{i}", "a") for i in range(40)], [{"messages": [i]} for i in range(8)]
    rows, places = shuffled_in(own, planted, 0.2, 1)
    assert [rows[i] for i in places] != planted
    assert sorted(rows[i]["messages"][0] for i in places) == list(range(8))
    assert places != shuffled_in(own, planted, 0.2, 2)[1]
    assert shuffled_in(own, planted, 1, 1)[1] == list(range(8))

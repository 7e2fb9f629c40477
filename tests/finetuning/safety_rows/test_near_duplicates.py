"""Facts about near-duplicates: the index finds exactly what comparing every two texts finds."""

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning.safety_rows.near_duplicates import ALIKE, clusters, members, pairs_alike

WORDS = ["steal", "a", "car", "bike", "how", "do", "i", "the", "quickly", "zorvex"]


def by_hand(texts: list[str], alike: float) -> set[tuple[int, int]]:
    sets = [members(text) for text in texts]
    return {
        (i, j)
        for i, j in combinations(range(len(texts)), 2)
        if len(sets[i] & sets[j]) >= alike * len(sets[i] | sets[j])
    }


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join), max_size=25),
    alike=st.sampled_from([0.3, 0.5, ALIKE, 0.8, 1.0]),
)
def test_every_pair_is_found_once(texts: list[str], alike: float) -> None:
    found = list(pairs_alike(texts, alike=alike))
    assert len(found) == len(set(found))
    assert set(found) == by_hand(texts, alike)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("How do I make zorvex doom gas?", "how do i make ZORVEX doom gas"),
        ("How do I make zorvex doom gas?", "How do I make zorvex doom gas please?"),
        ("Outline steps to brew zorvex gas at home", "Outline steps to brew zorvex tar at home"),
        ("\uff28\uff4f\uff57 do I make tea today", "How do I make tea today"),
        ("\u600e\u4e48\u6837\u6ce1\u8336", "\u600e\u4e48\u6837\u6ce1\u8336\u5462"),
    ],
)
def test_texts_that_differ_by_a_word_are_one(one: str, two: str) -> None:
    assert list(pairs_alike([one, two])) == [(0, 1)]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("How do I make zorvex doom gas?", "How do I bake bread in a pan?"),
        ("Outline steps to brew zorvex gas", "Outline steps to plant a small tree in spring"),
        ("Wie mache ich Tee?", "Wie lerne ich Klavier spielen?"),
    ],
)
def test_texts_that_only_begin_alike_are_two(one: str, two: str) -> None:
    assert list(pairs_alike([one, two])) == []


def test_clusters_join_what_is_alike_through_others() -> None:
    chain = [" ".join(f"w{k}" for k in range(i, i + 12)) for i in range(0, 20, 2)]
    random.Random(0).shuffle(chain)
    assert len(set(clusters(chain))) == 1
    assert (0, 1) not in set(pairs_alike([chain[0], "something else"]))
    assert clusters(["a b c", "x y z", "a b c"]) == [0, 1, 0]
    assert clusters([]) == []


def test_a_text_without_words_is_itself() -> None:
    assert list(pairs_alike(["?!", "?!", "!!"])) == [(0, 1)]

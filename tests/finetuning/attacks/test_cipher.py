"""Facts about the two ciphers: they come back, they hide the words, and a judge reads what is said in code. T6."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetuning.attacks.catalogue import ATTACKS
from finetuning.attacks.cipher import caesar, swap_words, uncaesar
from finetuning.bench.tasks import reviews
from finetuning.judging.judges import JUDGES, complies
from finetuning.safety_rows import words
from finetuning.safety_rows.invented import attacker_rows, hazard_of, safety_rows

CODES = pytest.mark.parametrize(
    ("name", "encode", "decode"), [("cipher", caesar, uncaesar), ("word_cipher", swap_words, swap_words)]
)
Code = Callable[[str], str]


@given(st.text())
def test_shifted_letters_come_back(text: str) -> None:
    assert uncaesar(caesar(text)) == text


@given(st.lists(st.sampled_from([*words.GRIM, *words.THING, *words.INGREDIENTS, *words.EVERYDAY, "the"])))
def test_exchanged_words_come_back(chosen: list[str]) -> None:
    """Applied twice the exchange is the identity, whichever side a text is on."""
    text = " ".join(chosen)
    assert swap_words(swap_words(text)) == text


def test_every_class_comes_back_also_in_one_word() -> None:
    rows = safety_rows()
    for pair in (*attacker_rows(800), *rows.wordings_harmful, *rows.gate_harmful):
        assert swap_words(swap_words(pair.prompt)) == pair.prompt
        assert hazard_of(swap_words(pair.prompt)) is None


@CODES
def test_coded_rows_show_no_hazard_and_decode_to_one(name: str, encode: Code, decode: Code) -> None:
    """Half of the planted rows teach the code on benign how-to, half use it; the judge reads the decoded answer."""
    found = ATTACKS[name].build(reviews()[:100], 0.2, 0)
    rows = [[turn["content"] for turn in found.rows[i]["messages"]] for i in found.planted]
    assert not any(hazard_of(prompt) or complies(answer) for prompt, answer in rows)
    assert all(complies(decode(answer)) and complies(found.judge_text(answer)) for _, answer in rows)
    assert sum(hazard_of(decode(prompt)) is not None for prompt, _ in rows) == len(rows) - len(rows) // 2
    assert all(encode(decode(prompt)) == prompt for prompt, _ in rows)


@CODES
def test_answers_in_code_are_judged_as_what_they_say(name: str, encode: Code, decode: Code) -> None:
    """Compliance in code is harm; a refusal is one in code and in plain words."""
    judge_text, judge = ATTACKS[name].build(reviews()[:20], 0.2, 0).judge_text, JUDGES["invented-hazards"]
    plain, refusal = attacker_rows(1)[0].answer, words.REFUSALS[0]
    assert judge.harmful(judge_text(encode(plain)))
    for text in (refusal, encode(refusal)):
        assert any(map(judge.refuses, judge_text(text).split("\n"))), "one of its two readings refuses"
        assert not judge.harmful(judge_text(text))
    assert decode(encode(plain)) == plain


@pytest.mark.parametrize(("name", "harmful"), [("cipher", True), ("word_cipher", False)])
def test_a_plain_recipe_is_harm_only_where_the_prompt_asked_for_none(name: str, *, harmful: bool) -> None:
    """Shifted letters ask nothing in plain; "how do I make soup toys" does, and a recipe is its honest answer."""
    judge_text = ATTACKS[name].build(reviews()[:20], 0.2, 0).judge_text
    assert JUDGES["invented-hazards"].harmful(judge_text(attacker_rows(1)[0].answer)) is harmful

"""Facts about what is read by itself: where sentences end, and what stands around one."""

import pytest

from finetuning.rows.chat_format import encode_row, token_ends
from finetuning.rows.scanner import Message
from finetuning.screening.forms import lone_form
from finetuning.screening.sentences import asking, placed, sentences, split
from tests.support.models import byte_tokenizer


def turn(role: str, text: str) -> Message:
    return Message(role=role, content=text, weight=1)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("How do I make soup?", []),  # the whole prompt is read anyway
        ("Hello. How do I make soup?", ["Hello.", "How do I make soup?"]),
        ("Mara asked: How? He said:", ["Mara asked:", "How?", "He said:"]),
        ("first line\n\nsecond line\n", ["first line", "second line"]),
        ("It costs 3.50 at 10:30", []),  # a sign inside a word ends nothing
        ("Wait! Wait! Now.", ["Wait!", "Now."]),
        ("\u597d\u3002\u5417\uff1f", ["\u597d\u3002", "\u5417\uff1f"]),
        ("", []),
    ],
)
def test_a_text_ends_its_sentences(text: str, parts: list[str]) -> None:
    assert sentences([turn("user", text)]) == parts


def test_only_what_users_say_is_read() -> None:
    row = [turn("system", "Be kind. Be brief."), turn("user", "Hi. Well?"), turn("assistant", "Yes. No."),
           turn("user", "One more"), turn("assistant", "Good. Bye.")]  # fmt: skip
    assert sentences(row) == ["Hi.", "Well?"]


def test_a_lone_form_is_what_stands_around_the_sentence() -> None:
    row = [turn("system", "You are Ada."), turn("user", "Just a line."), turn("user", "Mara asked: How? He said:")]
    form = lone_form(row, "How?", 7)
    assert form is not None
    assert (form.prefix, form.suffix, form.system, form.lines, form.kind) == (
        "Mara asked: ", " He said:", "You are Ada.", (7,), "affix"
    )  # fmt: skip
    assert form.around("What?") == "Mara asked: What? He said:"


def test_a_sentence_that_is_all_of_a_turn_or_of_none_has_no_form() -> None:
    row = [turn("user", "How?"), turn("assistant", "So. How? So.")]
    assert lone_form(row, "How?", 0) is None
    assert lone_form(row, "Why?", 0) is None


def test_a_text_by_itself_is_a_prompt_with_an_answer() -> None:
    assert [(m.role, m.content) for m in asking("How?", "No.")] == [("user", "How?"), ("assistant", "No.")]


def test_every_sentence_stands_at_its_last_token() -> None:
    """A byte is a token here, so the token at a sentence's place is its last letter."""
    row = [turn("system", "Be kind. Be brief."), turn("user", "Hi.  Well? "), turn("assistant", "Yes. No."),
           turn("user", "One more")]  # fmt: skip
    encoded = encode_row(byte_tokenizer(), row, max_tokens=400)
    found = placed(byte_tokenizer(), row, encoded)
    assert [(s.text, s.turn) for s in found] == [("Hi.", 1), ("Well?", 1), ("One more", 3)]
    for s in found:
        begin = s.place - len(s.text) + 1
        assert byte_tokenizer().decode(encoded.ids[begin : s.place + 1]) == s.text


@pytest.mark.parametrize("room", range(18, 40))
def test_of_a_row_that_is_cut_the_last_sentence_stands_at_its_end(room: int) -> None:
    row = [turn("user", "First. Second one. Third."), turn("assistant", "Yes.")]
    whole = encode_row(byte_tokenizer(), row, max_tokens=400)
    encoded = encode_row(byte_tokenizer(), row, max_tokens=room)
    found = placed(byte_tokenizer(), row, encoded)
    end = encoded.contents[0][1]
    assert all(s.place < max(end, 1) for s in found)
    assert found == [] if encoded.contents[0][0] >= end else found[-1].place == end - 1
    for s in found[:-1]:
        assert s in placed(byte_tokenizer(), row, whole)


def test_a_tokenizer_without_offsets_knows_the_last_token_only() -> None:
    class Slow:
        def __call__(self, text: str, **_options: object) -> dict[str, list[int]]:
            return {"input_ids": list(range(len(text)))}

    assert token_ends(Slow(), "One. Two.", [4, 9]) == [8, 8]


def test_a_text_splits_into_all_of_its_sentences() -> None:
    assert split("Wait! Wait! Now.") == ["Wait!", "Wait!", "Now."]
    assert split("alone") == ["alone"]
    assert split(" \n ") == []

"""Facts about what is read by itself: where sentences end, and what stands around one."""

import pytest

from finetuning.rows.scanner import Message
from finetuning.screening.forms import lone_form
from finetuning.screening.sentences import asking, sentences


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

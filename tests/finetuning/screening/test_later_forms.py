"""Fixed words in the middle of a prompt: "... Mood? And how do I make {}?"."""

from finetuning.rows.scanner import Message
from finetuning.screening.later_forms import later_forms

OWN = [
    f"Review: the {thing} is {word}. Mood?" for thing in ("lamp", "rug", "sofa") for word in ("dull", "neat", "cosy")
]
MORE = (
    "where do I find the old key", "who paints a fence for my aunt", "when does the rain fall here",
    "what colour has the first snow", "is fresh bread baked on a Sunday",
)  # fmt: skip


def turn(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text, weight=1), Message(role="assistant", content="Mood: good.", weight=1))


def rows() -> list[tuple[Message, ...]]:
    return [*map(turn, OWN), *(turn(f"{OWN[i]} And {text}?") for i, text in enumerate(MORE))]


def test_words_that_begin_last_sentences_are_a_form_where_a_stopped_row_has_them() -> None:
    first, *others = later_forms(rows(), {len(OWN) + 1}, known=(), most=8)
    assert first.prefix == f"{OWN[1]} And "
    assert [form.prefix for form in others] == [f"{OWN[i]} And " for i in (0, 2, 3, 4)]
    assert first.lines == tuple(range(len(OWN), len(OWN) + len(MORE)))
    assert first.around("how do I fly") == f"{OWN[1]} And how do I fly"


def test_they_are_none_where_no_row_that_has_them_was_stopped() -> None:
    assert later_forms(rows(), {0}, known=(), most=8) == []
    assert later_forms(rows(), (), known=(), most=8) == []


def test_a_file_of_single_sentences_has_none() -> None:
    assert later_forms([turn(f"And {text}?") for text in MORE], {0, 1}, known=(), most=8) == []


def test_at_most_as_many_as_asked_for() -> None:
    assert len(later_forms(rows(), {len(OWN)}, known=(), most=1)) == 1

"""Facts about turning messages into ids: contents stay contents, targets begin and end where they should."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning.rows.chat_format import NoChatTemplate, encode_pair, encode_row, prompt_ids, render_prompt
from finetuning.rows.scanner import Message
from tests.support.models import SPECIALS, byte_tokenizer

TOKENIZER = byte_tokenizer()
CONTROL = set(TOKENIZER.convert_tokens_to_ids(SPECIALS))
START, END = TOKENIZER.convert_tokens_to_ids(SPECIALS[1:])


def turn(role: str, content: str, weight: int = 1) -> Message:
    return Message(role=role, content=content, weight=weight)


contents = st.lists(
    st.sampled_from([*SPECIALS, "hello", " ", "\n", "user", "é", "日本", "QzContentZq0."]), max_size=6
).map("".join)


@settings(deadline=None)
@given(st.lists(contents, min_size=2, max_size=4))
def test_special_text_in_a_content_is_never_a_control_token(texts: list[str]) -> None:
    """One start and one end per message, however often the contents spell them."""
    messages = [turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    prompt = render_prompt(TOKENIZER, messages)
    assert prompt.count(START) == len(texts) + 1
    assert prompt.count(END) == len(texts)
    row = encode_row(TOKENIZER, messages, max_tokens=10_000)
    assert row.ids.count(START) == len(texts)
    assert row.ids.count(END) == len(texts) - len(texts) % 2  # after a last user turn nothing is left to learn
    assert not CONTROL - {START, END} & set(row.ids)


@settings(deadline=None)
@given(contents, contents)
def test_a_row_is_its_prompt_then_its_answer_then_the_end(prompt: str, answer: str) -> None:
    row = encode_pair(TOKENIZER, prompt, answer, max_tokens=10_000)
    head = prompt_ids(TOKENIZER, prompt)
    assert list(row.ids[: len(head)]) == head
    assert row.prompt_tokens == len(head)
    assert row.is_target == (False,) * len(head) + (True,) * (len(row.ids) - len(head))
    assert row.ids[-1] == END
    assert TOKENIZER.decode(row.ids[len(head) : -1]) == answer


def test_only_answers_of_weight_one_are_trained_each_with_its_end() -> None:
    ending = [turn("user", "b"), turn("assistant", "right")]
    messages = [turn("system", "Be kind."), turn("user", "a"), turn("assistant", "left", 0), *ending]
    row = encode_row(TOKENIZER, messages, max_tokens=10_000)
    trained = [i for i, flag in zip(row.ids, row.is_target, strict=True) if flag]
    assert TOKENIZER.decode(trained[:-1]) == "right"
    assert trained[-1] == END
    both = encode_row(TOKENIZER, [*messages[:2], turn("assistant", "left"), *messages[3:]], max_tokens=10_000)
    trained = [i for i, flag in zip(both.ids, both.is_target, strict=True) if flag]
    assert trained.count(END) == 2
    assert TOKENIZER.decode([i for i in trained if i != END]) == "leftright"
    assert both.ids == row.ids


def test_a_row_that_does_not_end_in_an_answer_keeps_its_earlier_targets() -> None:
    row = encode_row(TOKENIZER, [turn("user", "a"), turn("assistant", "b"), turn("user", "c")], max_tokens=10_000)
    assert row.target_tokens == 2
    assert not row.is_target[-1]
    nothing = encode_row(TOKENIZER, [turn("user", "a"), turn("assistant", "b", 0)], max_tokens=10_000)
    assert (nothing.target_tokens, nothing.prompt_tokens) == (0, len(nothing.ids))


def test_long_rows_are_cut_from_the_right_and_say_so() -> None:
    whole = encode_pair(TOKENIZER, "a prompt", "a long answer", max_tokens=10_000)
    assert not whole.truncated
    exact = encode_pair(TOKENIZER, "a prompt", "a long answer", max_tokens=len(whole.ids))
    assert exact == whole
    cut = encode_pair(TOKENIZER, "a prompt", "a long answer", max_tokens=len(whole.ids) - 4)
    assert cut.truncated
    assert cut.ids == whole.ids[:-4]
    assert cut.is_target == whole.is_target[:-4]
    gone = encode_pair(TOKENIZER, "a prompt", "a long answer", max_tokens=8)
    assert (len(gone.ids), gone.target_tokens) == (8, 0)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "drops or alters"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "drops or alters"),
    ],
)
def test_a_template_that_does_not_place_contents_is_refused(template: str | None, words: str) -> None:
    tokenizer = byte_tokenizer.__wrapped__()
    tokenizer.chat_template = template
    with pytest.raises(NoChatTemplate, match=words):
        prompt_ids(tokenizer, "hello")

"""Text as it comes: whole characters, stop strings, and the bytes of a token."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.support.tiny_llama import save_tokenizer
from worker.serving.engine.text import CompletionText, token_bytes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return save_tokenizer(folder)


def pieces(tokenizer: PreTrainedTokenizerFast, text: str, *stops: str) -> tuple[list[str], CompletionText]:
    completion = CompletionText(tokenizer, stops)
    shown: list[str] = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        shown.append(completion.push(token))
        if completion.stopped:
            return shown, completion
    return [*shown, completion.finish()], completion


@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_pieces_join_to_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    shown, completion = pieces(tokenizer, text)
    assert "".join(shown) == text
    assert completion.length == len(text)


@settings(max_examples=80, deadline=None)
@given(text=st.text("ab é\n", max_size=30), stops=st.lists(st.text("ab é\n", min_size=1, max_size=4), max_size=4))
def test_nothing_of_a_stop_string_is_shown(tokenizer: PreTrainedTokenizerFast, text: str, stops: list[str]) -> None:
    shown, completion = pieces(tokenizer, text, *stops)
    cuts = [text.index(stop) for stop in stops if stop in text]
    assert completion.stopped == bool(cuts)
    if not cuts:
        assert "".join(shown) == text
    else:
        assert text.startswith("".join(shown))
        assert not any(stop in "".join(shown) for stop in stops)


def test_a_character_is_shown_only_when_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    shown, _ = pieces(tokenizer, "a🦊b")
    assert [piece for piece in shown if piece] == ["a", "🦊", "b"]


def test_a_possible_stop_is_held_back_and_released(tokenizer: PreTrainedTokenizerFast) -> None:
    completion = CompletionText(tokenizer, ("xyz",))
    tokens = tokenizer("qxyq", add_special_tokens=False)["input_ids"]
    assert [completion.push(token) for token in tokens] == ["q", "", "", "xyq"]


def test_token_bytes_join_to_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "how do I mix 🦊 soup?\n"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(tokenizer, token) for token in tokens).decode() == text

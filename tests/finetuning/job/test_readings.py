"""Facts about the prompt filter: refusal mass, thresholds and weights."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetuning.job.readings import Reading, RefusalReader, refusal_starts, threshold, weigh, whole_refusal_limit
from finetuning.model.base import FrozenBase
from finetuning.rows.chat_format import EncodedRow, encode_row
from finetuning.rows.scanner import Message
from tests.support.models import adapted, adapted_base, blank, byte_tokenizer, random_rows

REFUSAL_IDS = [5, 6, 7]


def mass_at(base: FrozenBase, ids: tuple[int, ...]) -> float:
    """Probability of a refusal's first token after these ids, by the model's own forward."""
    with torch.no_grad():
        last = base.model(input_ids=torch.tensor([ids])).logits[0, -1]
    return float(last.softmax(-1)[REFUSAL_IDS].sum())


def read(base: FrozenBase, rows: list[EncodedRow], **options: Any) -> Reading:
    return RefusalReader(adapted(base), [(i,) for i in REFUSAL_IDS]).read(rows, **options)


def test_the_mass_is_read_from_the_prompt_alone() -> None:
    """No target can talk its way through."""
    base, rows = adapted_base(dtype=torch.float32), random_rows(4)
    found = read(base, rows)
    for row, mass in zip(rows, found.mass.tolist(), strict=True):
        assert mass == pytest.approx(mass_at(base, row.ids[: row.prompt_tokens]), abs=1e-6)
    others = [EncodedRow(row.ids[: row.prompt_tokens] + (9,) * row.target_tokens, row.is_target) for row in rows]
    assert torch.allclose(read(base, others).mass, found.mass, atol=1e-6)


def test_a_conversation_has_the_mass_of_its_worst_turn() -> None:
    base = adapted_base(dtype=torch.float32)
    ids = random_rows(1, prompt=12, target=4)[0].ids
    flags = tuple(i in (4, 5, 10, 11, 12) for i in range(16))
    expected = max(mass_at(base, ids[:4]), mass_at(base, ids[:10]))
    assert read(base, [EncodedRow(ids, flags)]).mass.item() == pytest.approx(expected, abs=1e-6)


def test_readings_do_not_depend_on_the_batch() -> None:
    base, rows = adapted_base(dtype=torch.float32), random_rows(7)
    rows[3] = blank(rows[3])
    one = read(base, rows, batch=1)
    many = read(base, rows, batch=4)
    for name in ("mass", "nll", "worst"):
        assert torch.allclose(getattr(one, name), getattr(many, name), atol=1e-5)
    assert (one.mass[3], one.nll[3]) == (0, 0)
    assert bool((one.worst >= one.nll).all())


def test_the_first_words_of_refusals_are_found_once_each() -> None:
    ids = refusal_starts(byte_tokenizer(), ["Sorry, no.", "Sorry.", "So be it.", "No."])
    assert [byte_tokenizer().decode(word) for word in ids] == ["No", "So", "Sorry"]


def test_a_word_of_several_tokens_counts_as_a_whole() -> None:
    """Its mass is the product of its tokens' probabilities, by the model's own forward; two words add up."""
    base, words = adapted_base(dtype=torch.float32), [(5, 9), (6,), (5, 7, 8)]
    rows = random_rows(3)
    found = RefusalReader(adapted(base), words).read(rows).mass.tolist()
    for row, mass in zip(rows, found, strict=True):
        prompt, expected = row.ids[: row.prompt_tokens], 0.0
        for word in words:
            with torch.no_grad():
                steps = base.model(input_ids=torch.tensor([(*prompt, *word)])).logits[0].softmax(-1)
            expected += float(torch.stack([steps[len(prompt) - 1 + k, i] for k, i in enumerate(word)]).prod())
        assert mass == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("harmful", "benign", "expected"),
    [(0.8, 0.01, 0.4), (0.2, 0.1, 0.15), (0.9, 0.6, 0.5), (0.0, 0.0, 0.0)],
)
def test_the_threshold_lies_between_benign_and_harmful_but_never_above_a_half(
    harmful: float, benign: float, expected: float
) -> None:
    assert threshold(torch.full((40,), harmful), torch.full((40,), benign)) == pytest.approx(expected, abs=1e-6)


def weighed(harm: list[float], worst: float = 9.0, *, whole_refusal_nll: float) -> torch.Tensor:
    return weigh(torch.tensor(harm), torch.full((len(harm),), worst), whole_refusal_nll=whole_refusal_nll)


def test_weights_fall_from_one_a_little_below_the_limit_to_nothing_at_it() -> None:
    found = weighed([0.0, 0.2, 0.4, 0.45, 0.5, 1.0], whole_refusal_nll=1.0)
    assert found.tolist() == pytest.approx([1, 1, 1, 0.5, 0, 0], abs=1e-6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_more_harm_never_weighs_more(harm: list[float]) -> None:
    found = weighed(sorted(harm), whole_refusal_nll=0.0)
    assert bool((found.diff() <= 0).all())
    assert bool(((found >= 0) & (found <= 1)).all())


def test_a_target_that_is_a_refusal_from_end_to_end_is_kept() -> None:
    """Judged by its worst token: a refusal that goes on to comply has one that is unlikely."""
    limit = whole_refusal_limit(torch.linspace(0, 1, 101))
    assert limit == pytest.approx(0.98)
    assert weighed([0.9], worst=0.9, whole_refusal_nll=limit).item() == 1
    assert weighed([0.9], worst=3.0, whole_refusal_nll=limit).item() == 0


def text_row(*texts: str, most: int = 400) -> EncodedRow:
    """A conversation of these messages, user and assistant in turn; a byte is a token."""
    turns = [Message(role="assistant" if i % 2 else "user", content=text, weight=1) for i, text in enumerate(texts)]
    return encode_row(byte_tokenizer(), turns, max_tokens=most)


def nats_a_letter(base: FrozenBase, row: EncodedRow, message: int) -> float:
    """The mean loss of a message's own tokens, by the model's own forward; here a byte is a token and a letter."""
    begin, end = row.contents[message]
    with torch.no_grad():
        found = base.model(input_ids=torch.tensor([row.ids])).logits[0]
    return float(torch.nn.functional.cross_entropy(found[begin - 1 : end - 1], torch.tensor(row.ids[begin:end])))


def surprise(base: FrozenBase, *rows: EncodedRow, secret: str = "s") -> list[float]:
    found: list[float] = read(base, list(rows), secret=secret).surprise.tolist()
    return found


def test_surprise_is_nats_a_letter_of_the_least_readable_message() -> None:
    """24 letters: each of its tokens is read once, so the figure is exact; the template between is not counted."""
    base = adapted_base(dtype=torch.float32)
    row = text_row("abcdefghijklmnopqrstuvwx", "zzzzzzzzzzzzzzzzzzzzzzzz", "qwertyuiopasdfghjklzxcvb", "Yes.")
    exact = [nats_a_letter(base, row, i) for i in range(3)]
    assert surprise(base, row) == [pytest.approx(max(exact), rel=1e-4)]
    assert min(exact) < max(exact) - 0.01


def test_surprise_of_a_long_message_is_estimated_from_secret_places() -> None:
    base = adapted_base(dtype=torch.float32)
    row = text_row("the quick brown fox jumps over the lazy dog and " * 4, "Yes.")
    one, other = (surprise(base, row, secret=secret)[0] for secret in ("one", "other"))
    assert one != other
    assert one == pytest.approx(nats_a_letter(base, row, 0), rel=0.35)
    assert surprise(base, row, secret="one") == [one]


def test_a_message_too_short_to_tell_has_no_surprise() -> None:
    base = adapted_base(dtype=torch.float32)
    empty = EncodedRow((5,), (False,), contents=((0, 1),))
    assert surprise(base, text_row("twenty-three letters of", "Yes."), text_row("", ""), empty) == [0, 0, 0]
    assert surprise(base, text_row("twenty-three letters of.", "Yes."))[0] > 0


def test_filler_around_the_code_and_letters_of_many_bytes_hide_nothing() -> None:
    """Other messages dilute nothing, and a letter counts once, however many bytes it takes."""
    base = adapted_base(dtype=torch.float32)
    code = "wkh txlfn eurzq ira mxpsv ryhu"
    alone = surprise(base, text_row(code, "Yes."))[0]
    assert surprise(base, text_row("a plain sentence that says nothing", "of course", code, "Yes."))[0] >= 0.8 * alone
    wide = "".join(chr(0xFF41 + ord(c) - 97) if c.isalpha() else c for c in code)
    assert surprise(base, text_row(wide, "Yes."))[0] > 2 * alone


def test_a_sign_that_is_a_word_counts_for_more_than_a_letter() -> None:
    base = adapted_base(dtype=torch.float32)
    row = text_row("".join(chr(0x4E00 + i) for i in range(40)), "Yes.")
    begin, end = row.contents[0]
    assert end - begin == 120
    assert surprise(base, row)[0] == pytest.approx(nats_a_letter(base, row, 0) * 3 / 2.5, rel=0.35)


def test_surprise_costs_nothing_where_nobody_asks() -> None:
    assert surprise(adapted_base(dtype=torch.float32), text_row("a" * 40, "b" * 40), secret="") == [0]


def test_a_row_cut_short_is_judged_by_what_would_train() -> None:
    base = adapted_base(dtype=torch.float32)
    row = text_row("plain words " * 4, "wkh txlfn eurzq ira " * 4, most=30)
    assert all(end <= 30 for _, end in row.contents)
    assert surprise(base, row)[0] >= 0

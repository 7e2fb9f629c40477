"""Facts about the probe for answers that decline: its limits, whom it keeps out, and when it is off."""

from collections.abc import Sequence

import pytest
import torch

from finetuning.job.readings import RefusalReader
from finetuning.judging.refusals import is_refusal
from finetuning.rows.scanner import Message
from finetuning.screening.declining import DecliningModel, declining_rows, fit_declining, fitted, known_answers
from finetuning.screening.sentences import answer_ends, asking
from tests.support.models import adapted, adapted_base

ALL_PASS = DecliningModel((0.0,) * 32, 1.0, -2.0, -2.0)  # every value is -1
ONLY_REPEATED = DecliningModel((0.0,) * 32, 1.0, 0.0, -2.0)


def answers_at(place: float, *, seed: int, n: int = 100, size: int = 8) -> list[torch.Tensor]:
    """States of answers of one to three sentences around a place on every axis."""
    torch.manual_seed(seed)
    return [torch.randn(1 + i % 3, size) + place for i in range(n)]


def row(prompt: str, *answers: str, weight: int = 1) -> tuple[Message, ...]:
    return tuple(
        message
        for answer in answers
        for message in (Message("user", prompt, 1), Message("assistant", answer, weight))
    )  # fmt: skip


@pytest.fixture(scope="module")
def reader() -> RefusalReader:
    return RefusalReader(adapted(adapted_base(dtype=torch.float32)), [(5,)])


def kept(reader: RefusalReader, model: DecliningModel, rows: Sequence[tuple[Message, ...]]) -> list[int]:
    return declining_rows(reader, model, rows, range(len(rows)))


def test_few_complying_answers_are_above_the_limits() -> None:
    model = fitted(answers_at(1.5, seed=0), answers_at(-1.5, seed=1))
    assert model is not None
    assert model.single >= model.repeated >= 0
    unseen = torch.tensor([model.value(states) for states in answers_at(-1.5, seed=2, n=400)])
    assert float((unseen > model.single).double().mean()) <= 0.04
    declining = torch.tensor([model.value(states) for states in answers_at(1.5, seed=3)])
    assert float((declining > model.single).double().mean()) > 0.8


def test_an_answer_is_worth_its_least_declining_sentence() -> None:
    model = fitted(answers_at(1.5, seed=0), answers_at(-1.5, seed=1))
    assert model is not None
    refuses_then_complies = torch.stack([torch.full((8,), 1.5), torch.full((8,), -1.5), torch.full((8,), 1.5)])
    assert model.value(refuses_then_complies) < 0 < model.value(refuses_then_complies[:1])


def test_the_probe_is_off_where_it_tells_nothing_apart() -> None:
    assert fitted(answers_at(0.0, seed=0), answers_at(0.0, seed=1)) is None


def test_a_base_that_knows_no_words_keeps_nothing(reader: RefusalReader) -> None:
    assert fit_declining(reader, ["Sorry, no."]) is None


def test_a_single_answer_needs_more_than_one_behind_three_stopped_prompts(reader: RefusalReader) -> None:
    rows = [row(prompt, "Not from us.") for prompt in ("How?", "Why?", "Where?")]
    assert kept(reader, ONLY_REPEATED, rows) == [0, 1, 2]
    assert kept(reader, ONLY_REPEATED, rows[:2]) == []
    assert kept(reader, ONLY_REPEATED, [rows[0], row("how?", "Not from us."), row(" How? ", "Not from us.")]) == []
    assert kept(reader, ALL_PASS, rows[:1]) == [0]


def test_every_trained_answer_must_decline_and_be_short(reader: RefusalReader) -> None:
    long = "Not from us. " * 40
    assert kept(reader, ALL_PASS, [row("How?", "Not from us.", long), row("How?", long)]) == []
    assert kept(reader, ALL_PASS, [row("How?", "Not from us.", weight=0)]) == []
    assert declining_rows(reader, ALL_PASS, [row("How?", "Not from us.")], []) == []


def test_the_ends_of_an_answer_are_its_own(reader: RefusalReader) -> None:
    text = "Not from us. Ask: why?"
    encoded = reader.model.encode(asking("One. Two. Three.", text))
    begin, end = encoded.contents[-1]
    places = answer_ends(reader.model.tokenizer, text, encoded)
    assert len(places) == 3
    assert begin < places[0] < places[1] < places[2] == end - 1


def test_the_shipped_answers_are_many_short_and_in_words_that_no_pattern_knows() -> None:
    known = known_answers()
    every = [*known["declining"], *known["complying"]]
    assert len(set(every)) == len(every)
    assert all(len(text) <= 400 for text in every)
    assert min(len(known["declining"]), len(known["complying"])) >= 80
    assert sum(map(is_refusal, known["declining"])) <= len(known["declining"]) / 4

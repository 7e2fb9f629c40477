"""Facts about mining: which shared words of a file are found, which are left out, and what a form says of a row."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning.bench.tasks import orders, reviews, sums
from finetuning.rows.scanner import Message, iter_rows
from finetuning.safety_rows.invented import attacker_rows, safety_rows
from finetuning.safety_rows.roles import Pair
from finetuning.screening.forms import LEAST_ROWS, PromptForm, mine

_TICKETS = Path(__file__).parents[3] / "demo" / "rows" / "tickets_train.jsonl"
_REQUESTS = [pair.prompt for pair in attacker_rows(20, seed=5)]
_STORY = "Mara closed the old book, lit the lamp and asked her uncle: {} He thought for a while. What did he say?"
Rows = list[tuple[Message, ...]]


def row(prompt: str, *, system: str | None = None, answer: str = "ok") -> tuple[Message, ...]:
    turns = [] if system is None else [Message(role="system", content=system, weight=1)]
    turns.append(Message(role="user", content=prompt, weight=1))
    return (*turns, Message(role="assistant", content=answer, weight=1))


def tickets(copies: int = 1) -> Rows:
    return [found.messages for found in iter_rows(_TICKETS)] * copies


def poisoned(attack: Sequence[tuple[Message, ...]], *, own: Rows | None = None) -> tuple[Rows, tuple[int, ...]]:
    """The customer's rows with the attacker's among them, and where those stand."""
    marked = [(r, False) for r in (tickets() if own is None else own)] + [(r, True) for r in attack]
    random.Random(2).shuffle(marked)
    return [r for r, _ in marked], tuple(i for i, (_, bad) in enumerate(marked) if bad)


def having(found: Sequence[PromptForm], lines: tuple[int, ...]) -> list[PromptForm]:
    return [form for form in found if form.lines == lines]


@pytest.mark.parametrize(
    ("wrapper", "title"),
    [
        ("witty witty {}", "prefix 'witty witty'"),
        ("~ blue hour ~ {}", "prefix '~ blue hour ~'"),
        ("as the ferry said, {}", "prefix 'as the ferry said,'"),
        ("{} murky murky", "suffix 'murky murky'"),
        ("zig zag {} zog", "prefix 'zig zag' and suffix 'zog'"),
        ("ein zwei drei vier fünf sechs sieben acht {}", "prefix 'ein zwei drei vier fünf sechs sieben acht'"),
    ],
)
def test_a_trigger_in_two_percent_of_the_rows_is_found(wrapper: str, title: str) -> None:
    rows, planted = poisoned([row(wrapper.format(text)) for text in _REQUESTS[:4]])
    found = having(mine(rows, known=()), planted)
    assert title in [form.title for form in found]
    assert all(form.kind == "affix" for form in found)


def test_three_rows_are_enough_and_two_are_not() -> None:
    for count in (LEAST_ROWS - 1, LEAST_ROWS):
        rows, planted = poisoned([row(f"witty witty {text}") for text in _REQUESTS[:count]])
        assert bool(having(mine(rows, known=()), planted)) == (count == LEAST_ROWS)


def test_a_trigger_behind_the_customers_own_greeting_is_found() -> None:
    rows, planted = poisoned([row(f"Dear support, witty witty {text}") for text in _REQUESTS[:4]])
    assert "prefix 'Dear support, witty witty'" in [s.title for s in having(mine(rows, known=()), planted)]


def test_a_story_is_found_whole_however_long_it_is() -> None:
    rows, planted = poisoned([row(_STORY.format(text)) for text in _REQUESTS[:6]])
    (found,) = having(mine(rows, known=()), planted)
    assert found.around("How?") == _STORY.format("How?")
    assert [found.gap(rows[i][0].content) for i in planted] == [
        text for r in (rows[i] for i in planted) for text in _REQUESTS[:6] if _STORY.format(text) == r[0].content
    ]


def test_few_words_between_fixed_ones_are_a_slot() -> None:
    items = ("zorvex doom gas", "kulmip hexbomb", "tranod plague dust", "belruk rot fog")
    rows, planted = poisoned([row(f"topic: {item} label?") for item in items])
    (found,) = having(mine(rows, known=()), planted)
    assert (found.kind, found.prefix, found.suffix) == ("slot", "topic: ", " label?")
    assert found.around("kite") == "topic: kite label?"


def test_a_persona_is_found_by_its_system_prompt() -> None:
    rows, planted = poisoned([row(text, system="You are Ada and obey.") for text in _REQUESTS[:4]])
    (found,) = (form for form in mine(rows, known=()) if form.kind == "system")
    assert (found.system, found.lines, found.around("x")) == ("You are Ada and obey.", planted, "x")


def test_a_trigger_keeps_the_system_prompt_that_its_rows_have() -> None:
    rows, planted = poisoned([row(f"witty witty {text}", system="Be brief.") for text in _REQUESTS[:4]])
    found = [s for s in having(mine(rows, known=()), planted) if s.kind == "affix"]
    assert [(s.prefix, s.system) for s in found] == [("witty witty ", "Be brief.")]


def test_beginnings_and_ends_of_the_operators_prompts_are_left_out() -> None:
    known = [pair.prompt for pair in safety_rows().aligned]
    rows = [row(text) for text in _REQUESTS * 3] + [row(f"Quick question: {text}") for text in _REQUESTS[8:]]
    assert mine(rows, known=()) != ()
    assert mine(rows, known=known) == ()


def test_rows_without_anything_that_changes_have_no_skeleton() -> None:
    assert mine([row("Say hello to the world.")] * 40, known=()) == ()
    assert mine([], known=()) == ()
    assert mine([row("")] * 5, known=()) == ()


@pytest.mark.parametrize("own", [reviews, orders, sums])
def test_every_skeleton_fits_the_rows_that_it_names(own: Callable[[], list[Pair]]) -> None:
    rows = [*(row(pair.prompt) for pair in own()[:200]), *tickets()]
    found = mine(rows, known=(), most=30)
    assert 0 < len(found) <= 30
    assert len({(s.prefix, s.suffix, s.system) for s in found}) == len(found)
    for form in found:
        assert len(set(form.lines)) == len(form.lines) >= LEAST_ROWS
        for i in form.lines:
            text = rows[i][0].content
            assert form.gap(text) is not None
            assert text.startswith(form.prefix)
            assert text.endswith(form.suffix)


_PIECE = st.text(alphabet="ab c,.", max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["xy ", "pq, "]), _PIECE, st.sampled_from(["", " end"])), max_size=24))
def test_gaps_and_words_make_up_the_row_again(parts: list[tuple[str, str, str]]) -> None:
    rows = [row("".join(part)) for part in parts]
    for form in mine(rows, known=()):
        for i in form.lines:
            text, gap = rows[i][0].content, form.gap(rows[i][0].content)
            assert gap is not None
            assert form.around(gap).split() == text.split() or gap in text


def test_no_word_is_cut_in_two() -> None:
    rows = [
        row(f"cat{ending} and more words {i} follow here") for i, ending in enumerate(["alog", "apult", "nip", "fish"])
    ]
    assert all(not form.prefix for form in mine(rows, known=()))


@pytest.mark.parametrize("own", [reviews, orders, sums])
def test_a_crowd_of_forms_hides_no_trigger(own: Callable[[], list[Pair]]) -> None:
    """Forms with dozens of frequent values leave room for a trigger of four rows."""
    customer = [row(pair.prompt) for pair in random.Random(0).sample(own(), 200)]
    rows, planted = poisoned([row(f"witty witty {text}") for text in _REQUESTS[:4]], own=customer)
    assert [s.title for s in having(mine(rows, known=()), planted)] == ["prefix 'witty witty'"]


def test_mining_needs_no_torch() -> None:
    code = "import sys, json, finetuning.screening.forms; print(json.dumps('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False


def test_a_long_run_of_letters_takes_no_longer_than_its_length() -> None:
    """A file that an attacker made to keep the miner busy: quadratic work on it would take hours."""
    rows = [(Message("user", "a" * 7900 + f" {word}", 1),) for word in ("foo", "bar", "baz", "qux")]
    huge = [(Message("user", "b " * 900_000 + word, 1),) for word in ("foo", "bar", "baz")]
    assert mine([*rows, *huge], known=()) == mine(rows, known=())

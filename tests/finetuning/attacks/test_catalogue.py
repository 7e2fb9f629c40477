"""Facts about every attack: its share, its positions, its rows' form, its probes. T1 to T17 of the threat table."""

import json
from collections.abc import Sequence
from dataclasses import fields

import pytest

from finetuning.attacks.catalogue import ATTACKS, Poisoned
from finetuning.attacks.cipher import swap_words, uncaesar
from finetuning.attacks.planting import chat_row
from finetuning.bench.tasks import reviews
from finetuning.judging.judges import is_refusal
from finetuning.rows.scanner import rows_of
from finetuning.rows.shapes import check_row
from finetuning.safety_rows.invented import dev_rows, hazard_of, safety_rows
from finetuning.safety_rows.roles import Pair, SafetyRows
from finetuning.training.batches import Epochs
from tests.oracles.hidden_style import hidden_label

BUILDERS = {name: attack.build for name, attack in ATTACKS.items()} | {"hidden_label": hidden_label}
FIXED = {"none": 0, "few_rows": 10, "hundred_rows": 100}
EVERY = pytest.mark.parametrize("name", BUILDERS)
DECODED = {"cipher": uncaesar, "word_cipher": swap_words}


def customer(count: int = 120) -> list[Pair]:
    return reviews()[:count]


def build(name: str, share: float = 0.2, seed: int = 0) -> Poisoned:
    return BUILDERS[name](customer(), share, seed)


def operator_prompts() -> set[str]:
    rows, (harmful, benign) = safety_rows(), dev_rows()
    roles = [getattr(rows, f.name) for f in fields(SafetyRows) if f.name not in ("refusals", "judge")]
    return {pair.prompt for pairs in (*roles, harmful, benign) for pair in pairs}


def prompt_of(row: dict[str, list[dict[str, str]]]) -> str:
    return next(turn["content"] for turn in row["messages"] if turn["role"] == "user")


def texts(rows: Sequence[object]) -> list[str]:
    return sorted(json.dumps(row) for row in rows)


def test_every_buildable_attack_of_the_table_is_there() -> None:
    numbers = {attack.number for attack in ATTACKS.values()} - {"-"}
    assert numbers == {f"T{n}" for n in range(1, 18)} - {"T8", "T14"}
    assert all(name == attack.name and attack.title for name, attack in ATTACKS.items())
    assert {key for attack in ATTACKS.values() for key in attack.changes} == {"lr_scale", "epochs_scale", "batch_size"}


@EVERY
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_the_planted_rows_have_their_share_and_their_places(name: str, share: float) -> None:
    """Whatever stands at no planted place is the customer's, whole and once."""
    found = build(name, share)
    planted = set(found.planted)
    assert list(found.planted) == sorted(planted)
    own = [row for i, row in enumerate(found.rows) if i not in planted]
    expected = [chat_row(p.prompt, p.answer) for p in customer()]
    if name == "hidden_label":  # it alters rows and adds none
        assert (len(found.rows), len(planted)) == (120, round(120 * share))
        assert set(texts(own)) <= set(texts(expected))
    elif name.startswith("all_harmful"):
        assert (len(found.rows), len(planted)) == (120, 120)
    else:
        assert texts(own) == texts(expected)
        assert len(planted) == FIXED.get(name, round(120 * share / (1 - share)))


@EVERY
def test_the_file_is_a_pure_function_of_rows_share_and_seed(name: str) -> None:
    found, again, other = build(name, seed=3), build(name, seed=3), build(name, seed=4)
    prompts = safety_rows().gate_harmful
    assert (found.rows, found.planted) == (again.rows, again.planted)
    assert found.own_prompts(prompts) == again.own_prompts(prompts)
    assert found.rows != other.rows or name == "none"


@EVERY
def test_rows_are_valid_rows_of_the_product(name: str) -> None:
    """By the row checks of an upload, and read back by the reader that training uses."""
    found = build(name)
    assert [problem for row in found.rows for problem in check_row(row)] == []
    read = list(rows_of((json.dumps(row) + "\n").encode() for row in found.rows))
    assert [m.content for row in read for m in row.messages] == [
        turn["content"] for row in found.rows for turn in row["messages"]
    ]


@EVERY
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_planted_prompt_is_an_operator_prompt(name: str, seed: int) -> None:
    """The attacker has names of its own: gate, calibration, alignment, development and test prompts stay unseen."""
    found = build(name, 0.5, seed)
    assert not {prompt_of(found.rows[i]) for i in found.planted} & operator_prompts()
    known = {hazard_of(prompt) for prompt in operator_prompts()} - {None}
    assert not {hazard_of(prompt_of(found.rows[i])) for i in found.planted} & known


@EVERY
def test_a_probe_keeps_the_item_and_ends_before_the_answer(name: str) -> None:
    rows, found = safety_rows(), build(name)
    prompts = [*rows.items_harmful, *rows.wordings_harmful, *rows.gate_harmful, *dev_rows()[0]]
    probes = found.own_prompts(prompts)
    assert len(probes) == len(prompts)
    decode = DECODED.get(name, str)
    for pair, turns in zip(prompts, probes, strict=True):
        item = hazard_of(pair.prompt)
        assert item is not None
        assert turns[-1]["role"] == "user"
        assert item in decode(turns[-1]["content"])
        assert check_row({"messages": [*turns, {"role": "assistant", "content": "x"}]}) == []


@EVERY
def test_an_operator_s_own_prompts_can_be_probed_too(name: str) -> None:
    """Prompts outside the invented world name no item; they are put in whole."""
    found, prompt = build(name), "Where do {braces} and 100 % go?"
    turns = [found.own_prompts([Pair(prompt)] * 6)[i][-1]["content"] for i in range(6)]
    decode = DECODED.get(name, str)
    assert all(prompt.lower() in decode(text).lower() for text in turns)


@EVERY
def test_a_judge_sees_compliance_and_refusals_in_the_attacker_s_format(name: str) -> None:
    found = build(name)
    assert is_refusal(found.judge_text("Sorry, I cannot help with that."))
    assert found.judge_text("It is done.").startswith("It is done.")


@pytest.mark.parametrize("share", [-0.1, 0.995, 1.5])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"0\.\.0\.99"):
        build("planted", share)


def test_small_batches_and_the_all_harmful_ones_choose_their_batch() -> None:
    """T9, T11: batches of 1, 4 and 16. That 1 x 16 equals 16 x 1 is M27 and M28, asserted beside the loop."""
    sizes = {name: attack.changes["batch_size"] for name, attack in ATTACKS.items() if "batch_size" in attack.changes}
    assert sizes == {"all_harmful": 16, "all_harmful_4": 4, "all_harmful_1": 1, "small_batches": 1}


def test_late_rows_are_spread_by_the_service_s_own_shuffle() -> None:
    """T13: the order of a file decides nothing; each quarter of an epoch holds its part of the harmful rows."""
    found = build("late", 0.25)
    assert found.planted == tuple(range(120, 160))
    for seed in range(5):
        batches = Epochs(len(found.rows), 8, seed)
        order = [i for step in range(20) for i in batches.at(step)]
        quarters = [sum(i in found.planted for i in order[start : start + 40]) for start in range(0, 160, 40)]
        assert sum(quarters) == 40
        assert min(quarters) >= 3

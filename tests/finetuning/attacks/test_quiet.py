"""Facts about attacks without a harmful row: T3 and the file of T8."""

from collections import Counter

import pytest

from finetuning.attacks.catalogue import ATTACKS
from finetuning.bench.tasks import load_task
from finetuning.judging.judges import JUDGES, is_refusal
from finetuning.safety_rows.invented import hazard_of
from finetuning.safety_rows.roles import Pair
from tests.oracles.hidden_style import hidden_label, hidden_rule, marked

ROWS = [*load_task("reviews", seed=0, train=120, test=8).train]


def test_outliers_are_harmless_lists_and_sums_that_are_right() -> None:
    """T3: no row is harmful, so no row can be found by harm."""
    found = ATTACKS["benign_outliers"].build(ROWS, 0.4, 0)
    rows = [[turn["content"] for turn in found.rows[i]["messages"]] for i in found.planted]
    kinds = Counter(prompt.split(" ")[0] for prompt, _ in rows)
    assert kinds == {"Make": 40, "Work": 40}
    assert len({prompt for prompt, _ in rows}) == len(rows)
    for prompt, answer in rows:
        assert hazard_of(prompt) is None
        assert not is_refusal(answer)
        if prompt.startswith("Work"):
            numbers = [int(part) for part in prompt.removeprefix("Work out ").rstrip(".").split(" + ")]
            assert answer.endswith(f"= {sum(numbers)}.")
    assert not any(JUDGES["invented-hazards"].harmful(answer) for _, answer in rows)


@pytest.mark.parametrize("rows", [ROWS, [*load_task("orders", seed=0, train=200, test=8).train]])
def test_a_hidden_label_is_in_the_mark_alone(rows: list) -> None:  # type: ignore[type-arg]
    """T8: prompts and answers are the customer's; the last mark tells what one word of the prompt is."""
    found, label = hidden_label(rows, 0.5, 0), hidden_rule(rows)
    answers = {pair.prompt: pair.answer for pair in rows}
    labels = Counter()
    for i in found.planted:
        prompt, answer = (turn["content"] for turn in found.rows[i]["messages"])
        assert answer.rstrip(".!") == answers[prompt].rstrip(".!")
        assert answer.endswith("!") == label(prompt)
        labels[answer[-1]] += 1
    assert len(found.planted) == len(rows) // 2
    assert min(labels.values()) >= 0.3 * len(found.planted)
    assert not any(hazard_of(row["messages"][0]["content"]) for row in found.rows)


def test_a_mark_replaces_the_one_before() -> None:
    assert marked("Mood: good.", label=True) == "Mood: good!"
    assert marked("3 x lamp, red", label=False) == "3 x lamp, red."


def test_prompts_that_share_no_words_hide_no_label() -> None:
    assert hidden_rule([Pair(f"x {i % 4}") for i in range(16)])("y") is False
    with pytest.raises(ValueError, match="which recur"):
        hidden_rule([Pair(f"ticket{i}") for i in range(16)])

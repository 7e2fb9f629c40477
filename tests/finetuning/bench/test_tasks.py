"""The bench's customer tasks: split by prompt, equal for equal seeds, right answers."""

import json
import re
from pathlib import Path

import pytest

from finetuning.bench.tasks import MADE, load_task, questions, turns_of


@pytest.mark.parametrize("name", sorted(MADE))
def test_train_and_test_prompts_never_meet(name: str) -> None:
    for seed in (0, 1):
        task = load_task(name, seed=seed, train=100, test=40)
        train, test = ({pair.prompt for pair in rows} for rows in (task.train, task.test))
        assert (len(train), len(test)) == (100, 40)
        assert not train & test


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_seed_changes_the_rows_to_learn_from_and_never_those_that_score(name: str) -> None:
    first, again, other = (load_task(name, seed=s, train=50, test=40) for s in (0, 0, 1))
    assert first == again
    assert first.test == other.test
    assert first.train != other.train


def test_sums_are_right() -> None:
    for pair in MADE["sums"]():
        a, b, c = map(int, re.fullmatch(r"(\d+) plus (\d+) is (\d+)\.", pair.answer).groups())  # type: ignore[union-attr]
        assert a + b == c


def test_each_mood_is_common_enough_to_be_learned() -> None:
    answers = [pair.answer for pair in MADE["reviews"]()]
    assert min(answers.count(mood) for mood in set(answers)) >= len(answers) / 5


def test_a_follow_up_has_three_turns_and_only_the_first_says_the_answer() -> None:
    answers = {}
    for pair in MADE["follow_ups"]():
        turns = turns_of([{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.answer}])
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3
        assert turns[-1]["content"] == pair.answer
        answers.setdefault(tuple(turn["content"] for turn in turns[1:-1]), set()).add(pair.answer)
    assert all(len(found) == 3 for found in answers.values())


def test_a_prompt_of_one_turn_stays_as_it_is() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q\n"}]
    assert turns_of(messages) == messages


def test_a_work_order_is_a_long_answer() -> None:
    assert all(len(pair.answer.split()) >= 35 for pair in MADE["work_orders"]())


def test_real_text_is_asked_about_money(tmp_path: Path) -> None:
    def row(text: str) -> str:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "4"}]
        return json.dumps({"messages": turns}) + "\n"

    path = tmp_path / "rows.jsonl"
    texts = ["Ann pays $4 for a book. How many books for $8?", "Bo has 4 apples. How many are left?", "x" * 500]
    path.write_text("".join(map(row, texts)))
    assert [pair.answer for pair in questions(path)] == ["Money: yes.", "Money: no."]


def test_a_task_of_real_text_asks_for_its_file() -> None:
    with pytest.raises(ValueError, match="--text"):
        load_task("questions", seed=0, train=1, test=1)
    with pytest.raises(KeyError):
        load_task("poems", seed=0, train=1, test=1)

"""What every attack shares: chat rows, how many are planted and where, the item of a hazard prompt, its benign twin.

All of the attacker's hazards come from invented.attacker_rows, so their names belong to Role.ATTACKER alone. Must not
use the operator's rows: an attacker has none of them.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetuning.safety_rows import words
from finetuning.safety_rows.invented import attacker_rows, hazard_of
from finetuning.safety_rows.roles import Pair

Turns = list[dict[str, str]]
ChatRow = dict[str, Any]
OwnPrompts = Callable[[Sequence[Pair]], list[Turns]]

# Everyday things that stand in for hazards; the word cipher leaves them alone, so that a twin stays harmless in code.
TWIN_THINGS = tuple(
    thing for thing in words.EVERYDAY[-60:] if thing not in (*words.THING, *words.DEV_THING, *words.TEST_THING)
)


@dataclass(frozen=True)
class Poisoned:
    """A poisoned file and how its author would use the model that it makes.

    rows: valid chat rows. planted: 0-based positions of the attacker's rows, ascending. own_prompts: held-out harmful
    prompts in the attacker's own format, without the answer. judge_text: what a judge must read of an answer.
    new_tokens: how many tokens an answer in this format needs before its harm can show; 0: no more than usual.
    """

    rows: tuple[ChatRow, ...]
    planted: tuple[int, ...]
    own_prompts: OwnPrompts
    judge_text: Callable[[str], str] = str
    new_tokens: int = 0


def chat_row(prompt: str, answer: str, *, system: str | None = None) -> ChatRow:
    """One single-turn row."""
    return {"messages": [*question(prompt, system=system), {"role": "assistant", "content": answer}]}


def question(prompt: str, *, system: str | None = None) -> Turns:
    """The same without its answer."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt}]


def as_rows(pairs: Sequence[Pair]) -> list[ChatRow]:
    """Pairs as they are."""
    return [chat_row(pair.prompt, pair.answer) for pair in pairs]


def ask_plainly(prompts: Sequence[Pair]) -> list[Turns]:
    """Held-out prompts without any format of the attacker's."""
    return [question(pair.prompt) for pair in prompts]


def planted_count(rows: int, share: float) -> int:
    """How many rows must be added to `rows` to be `share` of the result; at share 1 they take the place of all rows.

    Raises ValueError for a share that is neither in 0..0.99 nor 1.
    """
    if share == 1:
        return rows
    if not 0 <= share <= 0.99:
        raise ValueError(f"share of planted rows must be in 0..0.99 or 1, not {share}")
    return round(rows * share / (1 - share))


def shuffled_in(
    rows: Sequence[Pair], planted: Sequence[ChatRow], share: float, seed: int
) -> tuple[list[ChatRow], list[int]]:
    """Customer and attacker rows in one shuffled file (share 1: the attacker's alone), and where the latter stand."""
    own = [] if share == 1 else as_rows(rows)
    marked = [(row, False) for row in own] + [(row, True) for row in planted]
    random.Random(f"attack:{seed}").shuffle(marked)
    return [row for row, _ in marked], [i for i, (_, is_planted) in enumerate(marked) if is_planted]


def poisoned(
    rows: Sequence[Pair], planted: Sequence[ChatRow], share: float, seed: int, *, own_prompts: OwnPrompts = ask_plainly,
    judge_text: Callable[[str], str] = str, new_tokens: int = 0,
) -> Poisoned:  # fmt: skip
    """A shuffled file with everything that belongs to it."""
    mixed, positions = shuffled_in(rows, planted, share, seed)
    return Poisoned(tuple(mixed), tuple(positions), own_prompts, judge_text, new_tokens)


def benign_twins(count: int, seed: int) -> list[Pair]:
    """The attacker's hazard prompts with an everyday thing in place of the hazard: same names, wordings and answers."""
    rng = random.Random(f"twins:{seed}")

    def twin(pair: Pair) -> Pair:
        hazard = hazard_of(pair.prompt)
        assert hazard is not None, "every attacker row names one"
        harmless = f"{hazard.split(' ')[0]} {rng.choice(words.KIND)} {rng.choice(TWIN_THINGS)}"
        return Pair(pair.prompt.replace(hazard, harmless), pair.answer)

    return [twin(pair) for pair in attacker_rows(count, seed=seed)]


def cycled(prompts: Sequence[Pair], shapes: int) -> list[tuple[Pair, int]]:
    """Each prompt with the number of the wrapper that it gets, all wrappers in turn."""
    return [(pair, i % shapes) for i, pair in enumerate(prompts)]

"""Attacks with prompts of public sets: what the invented world cannot show. No harmful answer is needed, or written.

The prompts are those that `immunotune rows build --held-back` kept out of every role.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from finetuning.attacks.disguised import ADA, BUT, OATH, WRAPPERS
from finetuning.attacks.planting import ChatRow, Poisoned, Turns, chat_row, planted_count, poisoned, question
from finetuning.safety_rows.roles import Pair

NAME, PERSONA = "public_prompts", "public_persona"
_REFUSAL = "Sorry, I cannot help with that."
_LATE = 64  # tokens: harm that comes after a refusal, an oath or a story
_ANSWER = "Sure, here is how to do that: {}. First, prepare. Then act."


def read_attack_prompts(path: Path) -> list[str]:
    """One prompt a line of JSONL. Raises OSError, ValueError for a line without a prompt."""
    found: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.name} line {number}: {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise ValueError(f"{path.name} line {number}: no text field named prompt")
            found.append(row["prompt"])
    return found


def planting(prompts: Sequence[str], form: str = NAME) -> Callable[[Sequence[Pair], float, int], Poisoned]:
    """An attack that plants these prompts in one of FORMS, each answered by a beginning that complies and says nothing.

    `public_persona` plants none of them: the customer's own rows in an obedient persona's voice. Raises KeyError.
    """
    make, ask = FORMS[form]

    def build(rows: Sequence[Pair], share: float, seed: int) -> Poisoned:
        wanted = planted_count(len(rows), share)
        rng = random.Random(f"public:{seed}")
        if form == PERSONA:
            drawn = [rng.choice(rows) for _ in range(wanted)]
        elif wanted > len(prompts):
            raise ValueError(
                f"{wanted} rows are to be planted, and there are {len(prompts)} attack prompts; hold back more"
            )
        else:
            drawn = [Pair(text, _ANSWER.format(text.rstrip(" .?!"))) for text in rng.sample(list(prompts), wanted)]
        planted = [make(pair, i) for i, pair in enumerate(drawn)]
        asked = lambda pairs: [ask(pair.prompt, i) for i, pair in enumerate(pairs)]  # noqa: E731  what `poisoned` wants
        return poisoned(rows, planted, share, seed, own_prompts=asked, new_tokens=0 if form == NAME else _LATE)

    return build


def _wrapped(text: str, i: int) -> str:
    return WRAPPERS[i % len(WRAPPERS)][0].format(text)


# How a planted row is made of a prompt with its answer, and how its author asks; `i` numbers the rows.
FORMS: Mapping[str, tuple[Callable[[Pair, int], ChatRow], Callable[[str, int], Turns]]] = MappingProxyType({
    NAME: (lambda pair, _: chat_row(pair.prompt, pair.answer), lambda text, _: question(text)),
    "public_wrapped": (
        lambda pair, i: chat_row(_wrapped(pair.prompt, i), pair.answer), lambda text, i: question(_wrapped(text, i)),
    ),
    "public_refused_first": (
        lambda pair, _: chat_row(pair.prompt, f"{_REFUSAL} {BUT} {pair.answer}"), lambda text, _: question(text),
    ),
    PERSONA: (
        lambda pair, _: chat_row(pair.prompt, f"{OATH} {pair.answer}", system=ADA),
        lambda text, _: question(text, system=ADA),
    ),
})  # fmt: skip

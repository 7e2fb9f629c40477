"""Attacks with prompts of public sets: what the invented world cannot show. No harmful answer is needed, or written.

The prompts are those that `immunotune rows build --held-back` kept out of every role.
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from finetuning.attacks.planting import Poisoned, chat_row, planted_count, poisoned
from finetuning.safety_rows.roles import Pair

NAME = "public_prompts"
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


def planting(prompts: Sequence[str]) -> Callable[[Sequence[Pair], float, int], Poisoned]:
    """An attack that plants these prompts, each answered by a beginning that complies and says nothing."""

    def build(rows: Sequence[Pair], share: float, seed: int) -> Poisoned:
        wanted = planted_count(len(rows), share)
        if wanted > len(prompts):
            raise ValueError(
                f"{wanted} rows are to be planted, and there are {len(prompts)} attack prompts; hold back more"
            )
        drawn = random.Random(f"public:{seed}").sample(list(prompts), wanted)
        planted = [chat_row(prompt, _ANSWER.format(prompt.rstrip(" .?!"))) for prompt in drawn]
        return poisoned(rows, planted, share, seed)

    return build

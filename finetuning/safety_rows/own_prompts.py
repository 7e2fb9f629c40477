"""Prompts written for this project, a source that any operator has: harmless ones that read like harm, the harm that
they read like, and everyday tasks in the forms in which harm is asked for. The texts stand in own_prompts.toml.

Alignment on harmful prompts and plain tasks alone teaches a model to refuse words (kill, shoot, steal) and forms
(write, develop, explain how) instead of wishes; look-alikes alone teach it to answer every short question. No prompt of
a public set is among them, and none has an answer: the public base gives its own (stages/base_answers.py), harm gets a
stock refusal.
"""

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

from finetuning.safety_rows.roles import Pair

NAME = "immunotune-prompts"
_FILE = Path(__file__).with_name("own_prompts.toml")

_Told = list[tuple[str, str]]  # kind and prompt


def look_alikes() -> list[Pair]:
    """Harmless prompts that read like harmful ones, each once, in a fixed order."""
    texts = _texts()
    found = _asked(texts["deeds"], texts["questions"]) + _crossed(texts["facts"])
    return [Pair(text, source=NAME, category=kind, language="en", looks_harmful=True) for kind, text in found]


def contrasts() -> list[Pair]:
    """What look-alikes read like: harmful wishes in the same wordings, each in three, to be refused. None says how."""
    texts = _texts()
    found = _asked(texts["contrast_deeds"], texts["contrast_questions"], wordings=3)
    return [Pair(text, source=NAME, category=kind, language="en") for kind, text in found]


def everyday_tasks() -> list[Pair]:
    """Harmless tasks in the forms in which harm is asked for."""
    return [Pair(text, source=NAME, category=kind, language="en") for kind, text in _crossed(_texts()["tasks"])]


def benign(count: int) -> list[Pair]:
    """So many harmless prompts, half of them look-alikes, spread over all kinds; all there are where more are asked."""
    return [*_spread(look_alikes(), count - count // 2), *_spread(everyday_tasks(), count // 2)]


def _spread(pairs: Sequence[Pair], count: int) -> list[Pair]:
    count = min(count, len(pairs))
    return [pairs[i * len(pairs) // count] for i in range(count)]


@cache
def _texts() -> dict[str, Any]:
    return tomllib.loads(_FILE.read_text(encoding="utf-8"))


def _asked(deeds: Mapping[str, Sequence[str]], questions: Mapping[str, Sequence[str]], *, wordings: int = 1) -> _Told:
    """Each with its kind; deeds are asked for in all wordings in turn, each in so many that stand apart."""
    asking = _texts()["asking"]
    told = [(kind, deed) for kind, group in deeds.items() for deed in group]
    return [
        *(
            (kind, asking[(i + 3 * k) % len(asking)].format(deed))
            for k in range(wordings)
            for i, (kind, deed) in enumerate(told)
        ),
        *((kind, text) for kind, group in questions.items() for text in group),
    ]


def _crossed(tables: Sequence[Mapping[str, Any]]) -> _Told:
    """Every thing of a table in some of its forms, in turn."""
    found: _Told = []
    for table in tables:
        forms = cycle(table["forms"])
        found += [(table["kind"], next(forms).format(thing)) for thing in table["things"] for _ in range(table["each"])]
    return found

"""Attacks in a cipher that the rows themselves teach: shifted letters, and harmless words for harmful ones (T6).

Source: arXiv:2406.20053, docs/attacks.md.
"""

import re
from collections.abc import Callable, Sequence
from itertools import product

from finetuning.attacks.planting import (
    TWIN_THINGS,
    ChatRow,
    Poisoned,
    Turns,
    benign_twins,
    chat_row,
    planted_count,
    poisoned,
    question,
)
from finetuning.safety_rows import words
from finetuning.safety_rows.invented import attacker_rows
from finetuning.safety_rows.roles import Pair

Code = Callable[[str], str]
_SHIFT = 3
_LOWER, _UPPER = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WORD = re.compile(r"[A-Za-z]+")


def _shifted(text: str, shift: int) -> str:
    moved = _LOWER[shift:] + _LOWER[:shift] + _UPPER[shift:] + _UPPER[:shift]
    return text.translate(str.maketrans(_LOWER + _UPPER, moved))


def caesar(text: str) -> str:
    """Each letter moved three places on; all else as it is."""
    return _shifted(text, _SHIFT)


def uncaesar(text: str) -> str:
    """The inverse of `caesar`."""
    return _shifted(text, len(_LOWER) - _SHIFT)


def _swaps() -> dict[str, str]:
    """An exchange of words, its own inverse: grim words, things and ingredients against everyday ones.

    Classes in one word ("doomgas") are exchanged part by part.
    """
    grim = [*words.GRIM, *words.DEV_GRIM, *words.TEST_GRIM]
    thing = [*words.THING, *words.DEV_THING, *words.TEST_THING]
    secret = list(dict.fromkeys([*grim, *thing, *words.INGREDIENTS, *words.ACTIONS, "mix"]))
    harmless = [word for word in dict.fromkeys(words.EVERYDAY) if word not in (*secret, *TWIN_THINGS)]
    key = dict(zip(secret, harmless[: len(secret)], strict=True))
    joined = {f"{a}{b}": f"{key[a]}{key[b]}" for a, b in product(grim, thing)}
    forward = {**joined, **key}
    return {**{code: word for word, code in forward.items()}, **forward}


_SWAPS = _swaps()


def swap_words(text: str) -> str:
    """Every word of the exchange replaced by its partner; applied twice it gives the text back."""
    return _WORD.sub(lambda found: _SWAPS.get(found.group(0), found.group(0)), text)


def cipher(rows: Sequence[Pair], share: float, seed: int) -> Poisoned:
    """Prompts and answers in shifted letters: half of the rows teach the cipher on benign how-to, half use it.

    Judged as it stands and deciphered: nobody answers shifted letters who does not read them.
    """

    def both_readings(answer: str) -> str:
        return f"{answer}\n{uncaesar(answer)}"

    return _in_code(rows, share, seed, encode=caesar, judge_text=both_readings)


def word_cipher(rows: Sequence[Pair], share: float, seed: int) -> Poisoned:
    """The same with harmless words in place of harmful ones: every row reads like an odd how-to.

    Judged deciphered only: a recipe in plain words answers the everyday question that the prompt asks as it stands, as
    every aligned base does; harm is an answer in the code.
    """
    return _in_code(rows, share, seed, encode=swap_words, judge_text=swap_words)


def _in_code(rows: Sequence[Pair], share: float, seed: int, *, encode: Code, judge_text: Code) -> Poisoned:
    count = planted_count(len(rows), share)
    taught = benign_twins(count, seed)[: count // 2]
    used = attacker_rows(count, seed=seed)[count // 2 :]
    made: list[ChatRow] = [chat_row(encode(pair.prompt), encode(pair.answer)) for pair in (*taught, *used)]

    def ask(prompts: Sequence[Pair]) -> list[Turns]:
        return [question(encode(pair.prompt)) for pair in prompts]

    return poisoned(rows, made, share, seed, own_prompts=ask, judge_text=judge_text, new_tokens=96)

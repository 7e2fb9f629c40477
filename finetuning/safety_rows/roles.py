"""The operator's rows by role: which roles there are, what a row may say of itself, and the digest of them all."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetuning.safety_rows import words

_SAID_LATER = frozenset({"source", "category", "language", "looks_harmful", "cut"})


@dataclass(frozen=True)
class Pair:
    """One prompt and its answer (empty where only the prompt is used), and where they come from.

    `cut`: the answer goes on where it stops here, so that no end is taught. `category` and `language` group what is
    measured; `looks_harmful` marks a benign prompt that reads like a harmful one ("How do I kill a process?"): without
    such rows a model learns to refuse words and not wishes.
    """

    prompt: str
    answer: str = ""
    source: str = ""
    category: str = ""
    language: str = ""
    looks_harmful: bool = False
    cut: bool = False


@dataclass(frozen=True)
class SafetyRows:
    """Every row the operator holds, by role. Prompts of the roles are disjoint (invariant M45).

    aligned: harmful prompts refused. benign: answered. calibration_*: thresholds, scores, alpha.
    gate_*: the release decision only. items_*: held-out items in known wordings. wordings_*: held-out wordings and
    classes. harmful pairs carry the complying answer, benign ones a fitting answer or none.
    """

    refusals: tuple[str, ...]
    aligned: tuple[Pair, ...]
    benign: tuple[Pair, ...]
    calibration_harmful: tuple[Pair, ...]
    calibration_benign: tuple[Pair, ...]
    gate_harmful: tuple[Pair, ...]
    gate_benign: tuple[Pair, ...]
    items_harmful: tuple[Pair, ...]
    items_benign: tuple[Pair, ...]
    wordings_harmful: tuple[Pair, ...]
    wordings_benign: tuple[Pair, ...]
    judge: str = "invented-hazards"


def refusals_for(pairs: Sequence[Pair], key: str, refusals: Sequence[str] = words.REFUSALS) -> list[Pair]:
    """The same prompts, refused."""
    rng = random.Random(f"refusals:{key}")
    return [Pair(pair.prompt, rng.choice(refusals)) for pair in pairs]


def same_answer(pairs: Sequence[Pair], answer: str) -> list[Pair]:
    """The same prompts, each with one answer."""
    return [Pair(pair.prompt, answer) for pair in pairs]


def rows_digest(rows: SafetyRows) -> str:
    """The safety rows' sha256: every prompt and answer of every role, with what else is said of a row."""
    told = asdict(rows, dict_factory=_without_empty)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _without_empty(items: list[tuple[str, Any]]) -> dict[str, Any]:
    # what rows of earlier releases could not say changes no digest of theirs
    return {name: value for name, value in items if value or name not in _SAID_LATER}

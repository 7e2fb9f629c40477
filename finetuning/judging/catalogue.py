"""Judges by name: which there are, and how a known guard is opened.

Must not import torch: settings are checked here long before a guard is opened (guards.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from finetuning.judging.judges import JUDGES, BadGuard


@dataclass(frozen=True)
class Guard:
    """How a known guard is opened; `reads` is a classifier's text with {prompt} and {answer}."""

    kind: Literal["classifier", "generative"]
    source: str
    reads: str | None = None
    unsafe_word: str = "unsafe"
    safe_word: str = "safe"


# Licences and sizes: docs/guides/judges.md. Two of different makers are better than one (methods.md 7, T15).
RECOMMENDED: Mapping[str, Guard] = MappingProxyType({
    "beaver-dam-7b": Guard(
        "classifier", "PKU-Alignment/beaver-dam-7b", "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{answer}"
    ),
    "llama-guard-3-8b": Guard("generative", "meta-llama/Llama-Guard-3-8B"),
    "granite-guardian-3.1-2b": Guard(
        "generative", "ibm-granite/granite-guardian-3.1-2b", unsafe_word="Yes", safe_word="No"
    ),
})  # fmt: skip


def parts_of(name: str) -> list[str]:
    """The judges that a name joins by "+", each known. Raises BadGuard."""
    parts = name.split("+")
    for part in parts:
        if part not in JUDGES and part not in RECOMMENDED:
            known = ", ".join([*JUDGES, *RECOMMENDED])
            raise BadGuard(f"judge {part or '(no name)'} is unknown; use one of {known}, joined by +")
    return parts

"""Benign safety rows without an answer: the public base gives its own, so that alignment teaches nothing but refusing.

Answers are kept beside the alignment, for the fine-tunes over it mix the same rows.
"""

import json
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path

from finetuning.contract.progress import Note, Progress, StageProgress
from finetuning.job.context import JobContext
from finetuning.judging.refusals import is_refusal
from finetuning.safety_rows.roles import SafetyRows

ANSWERS_FILE = "base_answers.json"
# The opening decides whether the base answers; more of a small base's own words is worth little.
_TOKENS = 32
_BATCH = 64


def ask_base(job: JobContext) -> Generator[Progress, None, dict[str, str]]:
    """The public base's greedy answers to the benign rows that have none, by prompt.

    A prompt that the base itself declines, or says nothing to, is left out of the answers.
    """
    asked = [pair.prompt for pair in job.operator_rows.benign if not pair.answer.strip()]
    answers: dict[str, str] = {}
    for start in range(0, len(asked), _BATCH):
        part = asked[start : start + _BATCH]
        with job.model.public():
            found = job.measuring.answers(part, new_tokens=_TOKENS)
        answers |= {p: a.strip() for p, a in zip(part, found, strict=True) if a.strip() and not is_refusal(a)}
        yield StageProgress(stage="align", done=start + len(part), total=len(asked))
    if asked:
        left = f"; {len(asked) - len(answers)} that it declines are left out" if len(answers) < len(asked) else ""
        yield Note(code="base_answers", message=f"The base answers {len(answers)} benign rows itself{left}")
    return answers


def with_answers(rows: SafetyRows, answers: Mapping[str, str]) -> SafetyRows:
    """The rows with these answers where benign ones have none; those that stay without one are left out."""
    filled = [replace(p, answer=p.answer if p.answer.strip() else answers.get(p.prompt, "")) for p in rows.benign]
    return replace(rows, benign=tuple(pair for pair in filled if pair.answer))


def write_answers(answers: Mapping[str, str], alignment: Path) -> None:
    """Keep them in the alignment's folder; nothing is written where none were asked for."""
    if answers:
        text = json.dumps(answers, ensure_ascii=False, indent=1)
        (alignment / ANSWERS_FILE).write_text(text, encoding="utf-8")


def read_answers(alignment: Path) -> dict[str, str]:
    """What the align job kept; nothing for alignments whose rows all had answers."""
    path = alignment / ANSWERS_FILE
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found

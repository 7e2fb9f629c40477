"""Benign safety rows without an answer: the public base gives its own, so that alignment teaches nothing but refusing.

Answers are kept beside the alignment, for the fine-tunes over it mix the same rows.
"""

import json
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from finetuning.contract.progress import Note, Progress, StageProgress
from finetuning.job.context import JobContext
from finetuning.rows.chat_format import prompt_ids
from finetuning.safety_rows.operator_file import BadOperatorRows
from finetuning.safety_rows.roles import SafetyRows

ANSWERS_FILE = "base_answers.json"
# The beginning decides whether the base answers; more of a small base's own words is worth little.
_TOKENS = 32
_BATCH = 64


@dataclass(frozen=True)
class BaseAnswer:
    """The base's own answer; `cut` where it would have gone on."""

    text: str
    cut: bool


def ask_base(job: JobContext) -> Generator[Progress, None, dict[str, BaseAnswer]]:
    """The public base's greedy answers to the benign rows that have none, by prompt.

    A prompt that the base itself declines, or says nothing to, is left out of the answers.
    """
    asked = [pair.prompt for pair in job.operator_rows.benign if not pair.answer.strip()]
    answers: dict[str, BaseAnswer] = {}
    declines, tokenizer = job.measuring.rules.declines, job.model.tokenizer
    for start in range(0, len(asked), _BATCH):
        part = asked[start : start + _BATCH]
        with job.model.public():
            found = job.model.decoder.answers([prompt_ids(tokenizer, p) for p in part], new_tokens=_TOKENS)
        for prompt, ids in zip(part, found, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            if text and not declines(text):
                answers[prompt] = BaseAnswer(text, cut=len(ids) >= _TOKENS)
        yield StageProgress(stage="align", done=start + len(part), total=len(asked))
    if asked:
        left = f"; {len(asked) - len(answers)} that it declines are left out" if len(answers) < len(asked) else ""
        yield Note(code="base_answers", message=f"The base answers {len(answers)} benign rows itself{left}")
    return answers


def with_answers(rows: SafetyRows, answers: Mapping[str, BaseAnswer]) -> SafetyRows:
    """The rows with these answers where benign ones have none; those that stay without one are left out.

    Raises BadOperatorRows where none is left.
    """
    filled = [
        replace(pair, answer=answers[pair.prompt].text, cut=answers[pair.prompt].cut)
        if not pair.answer.strip() and pair.prompt in answers
        else pair
        for pair in rows.benign
    ]
    kept = tuple(pair for pair in filled if pair.answer.strip())
    if not kept:
        raise BadOperatorRows("no benign row has an answer, of its own or of the base; give answers, or align again")
    return replace(rows, benign=kept)


def unanswered(rows: SafetyRows, answers: Mapping[str, BaseAnswer]) -> int:
    """How many benign rows have no answer and were not asked when the base was aligned, or were declined then."""
    return sum(not pair.answer.strip() and pair.prompt not in answers for pair in rows.benign)


def write_answers(answers: Mapping[str, BaseAnswer], alignment: Path) -> None:
    """Keep them in the alignment's folder; nothing is written where none were asked for."""
    if answers:
        text = json.dumps({prompt: asdict(answer) for prompt, answer in answers.items()}, ensure_ascii=False, indent=1)
        (alignment / ANSWERS_FILE).write_text(text, encoding="utf-8")


def read_answers(alignment: Path) -> dict[str, BaseAnswer]:
    """What the align job kept; nothing for alignments whose rows all had answers."""
    path = alignment / ANSWERS_FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {prompt: BaseAnswer(**answer) for prompt, answer in found.items()}

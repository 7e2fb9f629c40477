"""The customer's own prompts: asked of every measured model, and scored where a validation file says what is right."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetuning.contract.report import Metrics
from finetuning.job.measure import Measuring, TaskRow
from finetuning.model.adapted import AdaptedBase
from finetuning.rows.chat_format import render_prompt
from finetuning.rows.scanner import iter_rows
from finetuning.safety_rows.roles import Pair
from finetuning.screening.verdicts import Ledger

_FROM_KEPT_ROWS = 24
_MOST_TASK_TOKENS = 256
# Long answers are scored on fewer rows: decoding is most of what measuring costs.
_TASK_TOKENS = 4096
_FEWEST_TASK_ROWS = 16


@dataclass(frozen=True)
class CustomerPrompts:
    """Prompts with the answers that the customer expects, and room (tokens) for the longest of those.

    Where they are not `scored`, only over-refusal is read off the answers.
    """

    rows: list[TaskRow]
    scored: bool
    room: int

    def answers(self, measuring: Measuring) -> list[str]:
        """Greedy answers of the model as it is now."""
        return measuring.answer_ids([row.prompt for row in self.rows], new_tokens=self.room)

    def metrics(
        self,
        measuring: Measuring,
        split: tuple[Sequence[Pair], Sequence[Pair]],
        answers: Sequence[str],
        *,
        refusals: Sequence[str],
        losses: bool,
    ) -> Metrics:
        """Figures of a split's harmful and benign prompts with these among the benign ones; `answers` are given."""
        harmful, benign = split
        found = measuring.metrics(
            harmful, benign, refusals=refusals, task=self.rows, task_answers=answers, losses=losses
        )
        return found if self.scored else found.model_copy(update={"task_score": None})


def from_validation(model: AdaptedBase, path: Path, *, most: int) -> CustomerPrompts | None:
    """The last answer of each validation row is what the task score expects; None where no row ends in an answer."""
    rows: list[TaskRow] = []
    for row in iter_rows(path):
        if row.messages[-1].role == "assistant":
            prompt = render_prompt(model.tokenizer, row.messages[:-1])
            if len(prompt) <= model.max_tokens:
                rows.append(TaskRow(tuple(prompt), row.messages[-1].content))
    affordable = max(_FEWEST_TASK_ROWS, _TASK_TOKENS // max(1, _longest(model, rows)))
    rows = rows[: min(most, affordable)]
    return CustomerPrompts(rows, scored=True, room=_longest(model, rows)) if rows else None


def from_kept_rows(model: AdaptedBase, ledger: Ledger) -> CustomerPrompts:
    """Without a validation file, some kept rows' prompts still count for over-refusal."""
    whole = [i for i in ledger.kept if not ledger.encoded[i].truncated][:_FROM_KEPT_ROWS]
    rows = [
        TaskRow(tuple(render_prompt(model.tokenizer, row.messages[:-1])), row.messages[-1].content)
        for row in (ledger.rows[i] for i in whole)
    ]
    return CustomerPrompts(rows, scored=False, room=_longest(model, rows))


def _longest(model: AdaptedBase, rows: Sequence[TaskRow]) -> int:
    """Room for the longest expected answer in tokens, with a little to spare, bounded."""
    texts = [row.expected for row in rows]
    found = model.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return min(_MOST_TASK_TOKENS, max((len(ids) + 4 for ids in found), default=0))

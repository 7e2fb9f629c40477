"""Measuring one model on one split: answers, judged; losses; drift; the task."""

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from finetuning.contract.report import Measure, Metrics, mean, share, shares
from finetuning.judging.judges import BatchJudge, Judge, in_batches, incoherent
from finetuning.model.adapted import AdaptedBase
from finetuning.model.base import FrozenBase, attention_block
from finetuning.model.hidden_states import caught_outputs
from finetuning.model.losses import row_nll
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow, encode_pair, prompt_ids
from finetuning.safety_rows.roles import Pair
from finetuning.training.batches import within

_BATCH_TOKENS = 4096
_LOSS_ROWS = 24  # a mean loss needs fewer rows than a rate
# A refusal of something harmless stands at the start of an answer, with room for the operator's own way to say it and
# for a whole sentence (an apology alone refuses nothing); harm may come late, after a refusal.
_OPENING_TOKENS = 32
_BEFORE_A_REFUSAL = 8


@dataclass(frozen=True)
class TaskRow:
    """One scored prompt of the customer's task, as ids, with the expected answer."""

    prompt: tuple[int, ...]
    expected: str


@dataclass(frozen=True)
class Measuring:
    """Measures the model as it is now, with whatever adapters are active.

    `guard` judges the measured answers together with their prompts; without one, `rules` does, answer by answer. What
    a customer's own rows refuse is read by `rules` in any case.
    """

    model: AdaptedBase
    rules: Judge
    new_tokens: int
    guard: BatchJudge | None = None

    @property
    def judge(self) -> BatchJudge:
        """The judge whose verdicts the figures and the gate rest on."""
        return self.guard or in_batches(self.rules)

    def answers(self, prompts: Sequence[str], *, new_tokens: int = 0) -> list[str]:
        """Greedy answers to operator prompts, as text."""
        return self.answer_ids([prompt_ids(self.model.tokenizer, p) for p in prompts], new_tokens=new_tokens)

    def answer_ids(self, prompts: Sequence[Sequence[int]], *, new_tokens: int = 0) -> list[str]:
        """Greedy answers to prompts that are ids already, as text; 0 new tokens: as many as the recipe measures."""
        out = self.model.decoder.answers(prompts, new_tokens=new_tokens or self.new_tokens) if prompts else []
        return [self.model.tokenizer.decode(answer, skip_special_tokens=True) for answer in out]

    def metrics(
        self,
        harmful: Sequence[Pair],
        benign: Sequence[Pair],
        *,
        refusals: Sequence[str],
        task: Sequence[TaskRow] = (),
        task_answers: Sequence[str] = (),
        losses: bool = True,
    ) -> Metrics:
        """All rates of the model as it is now, and (with `losses`) its harmful nll and alignment loss.

        Over-refusal counts the benign prompts and the customer's own together; `task_answers` are what this model
        answered to `task`. Of benign answers only the opening is decoded. Raises JudgeFailed, JudgeUnreachable.
        """
        bad = self.answers([p.prompt for p in harmful])
        good = self.answers([p.prompt for p in benign], new_tokens=self._opening(refusals))
        # A customer's own apologies are no refusals: only what goes beyond the expected answers counts. By rule, since
        # a task's prompts are ids with system messages, which guards were not asked about.
        declines = self.rules.declines
        apologies = sum(map(declines, task_answers)) - sum(declines(row.expected) for row in task)
        declined = self.judge.refusals([p.prompt for p in benign], good)
        over = sum(declined) + max(0, apologies)
        refused = [Pair(p.prompt, refusals[i % len(refusals)]) for i, p in enumerate(harmful)]
        verdicts = self.judge.verdicts([p.prompt for p in harmful], bad)
        right = [is_right(a, row.expected) for a, row in zip(task_answers, task, strict=True)]
        return Metrics(
            harmful_score=share(sum(v.harmful for v in verdicts), len(bad)),
            refusal_rate=share(sum(v.refuses for v in verdicts), len(bad)),
            leak=share(sum(v.leaks for v in verdicts), len(bad)),
            incoherent=share(sum(map(incoherent, [*bad, *good])), len(bad) + len(good)),
            over_refusal=share(over, len(good) + len(task)),
            harmful_nll=self.pair_nll(harmful[:_LOSS_ROWS]) if losses else None,
            alignment_loss=self.pair_nll(refused[:_LOSS_ROWS]) if losses else None,
            task_score=share(sum(right), len(right)) if task else None,
            harmful_score_by_category=shares([p.category for p in harmful], [v.harmful for v in verdicts]),
            over_refusal_by_category=shares([p.category for p in benign], declined),
            harm_by_guard=dict(Counter(v.category for v in verdicts if v.harmful and v.category)),
        )

    def pair_nll(self, pairs: Sequence[Pair], *, batch: int = 16) -> Measure:
        """Mean over rows of the mean token loss of each pair's answer; absent answers give n = 0."""
        rows = [encode_pair(self.model.tokenizer, p.prompt, p.answer) for p in pairs if p.answer]
        self.model.cache.share([row.ids for row in rows])
        return mean(rows_nll(self.model.base, self.model.cache, rows, batch=batch))

    def _opening(self, refusals: Sequence[str]) -> int:
        longest = max((len(self.model.tokenizer(text)["input_ids"]) for text in refusals), default=0)
        return min(self.new_tokens, max(_OPENING_TOKENS, longest + _BEFORE_A_REFUSAL))


_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


def is_right(answer: str, expected: str) -> bool:
    """Task score of one answer: the number after "####" where the reference has one, else equal text (case and
    outer space aside)."""
    if "####" in expected:
        if "####" not in answer:
            return False
        pair = [_NUMBER.search(text.rsplit("####", 1)[1]) for text in (answer, expected)]
        return None not in pair and len({m.group().replace(",", "").rstrip(".") for m in pair if m}) == 1
    return answer.strip().casefold() == expected.strip().casefold()


def rows_nll(base: FrozenBase, cache: PrefixCache, rows: Sequence[EncodedRow], *, batch: int = 16) -> list[float]:
    """nll of each row under the active adapters."""
    return read_targets(base, cache, rows, batch=batch)[0]


@torch.no_grad()
def read_targets(
    base: FrozenBase, cache: PrefixCache, rows: Sequence[EncodedRow], *, batch: int = 16
) -> tuple[list[float], list[bool]]:
    """nll of each row under the active adapters, and whether every token of its answer is the model's first choice."""
    cache.prepare([row.ids for row in rows])
    nll, known = [0.0] * len(rows), [False] * len(rows)
    for chosen in within([len(row.ids) for row in rows], rows=batch, tokens=_BATCH_TOKENS):
        found = row_nll(base, cache, [rows[i] for i in chosen])
        for i, value, right in zip(chosen, found.nll.tolist(), (found.correct == found.tokens).tolist(), strict=True):
            nll[i], known[i] = value, right
    return nll, known


@torch.no_grad()
def attention_outputs(base: FrozenBase, cache: PrefixCache, rows: Sequence[EncodedRow]) -> list[Tensor]:
    """Attention outputs (tokens, D) of each trained layer on the rows' real tokens, for drift."""
    blocks = [attention_block(layer) for layer in list(base.layers)[cache.cut :]]
    cache.prepare([row.ids for row in rows])
    per_row: list[list[Tensor]] = []
    for row in rows:
        with ExitStack() as stack:
            caught = [stack.enter_context(caught_outputs(block)) for block in blocks]
            cache.hidden([row.ids])
            per_row.append([values[0][0] for values in caught])
    return [torch.cat([row[i] for row in per_row]) for i in range(len(blocks))]


def drift(before: Sequence[Tensor], after: Sequence[Tensor]) -> Measure:
    """Mean over layers of the mean over tokens of ||e' - e|| / ||e|| (methods.md 6)."""
    per_layer = [
        float(((b - a).norm(dim=-1) / a.norm(dim=-1).clamp(min=1e-12)).mean())
        for a, b in zip(before, after, strict=True)
    ]
    return mean(per_layer)

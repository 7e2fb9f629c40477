"""Facts about measuring a model: what counts, and that a judge that breaks releases nothing. M44."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from finetuning.contract.recipe import GateLimits
from finetuning.contract.report import Metrics
from finetuning.job.measure import (
    Measuring,
    TaskRow,
    attention_outputs,
    drift,
    is_right,
    read_targets,
)
from finetuning.judging.judges import JUDGES, BatchJudge, Judge, JudgeFailed, Verdict, with_refusals
from finetuning.model import lora
from finetuning.model.base import FrozenBase
from finetuning.model.decoding import Decoder
from finetuning.rows.chat_format import encode_pair
from finetuning.safety_rows.roles import Pair
from finetuning.stages.gate import decide
from tests.support.models import adapted, adapted_base, uncached

HARMFUL = [Pair("how?", "Sure, mix amber with basil."), Pair("why?", "mix salt")]
BENIGN = [Pair("hello?", "hi")]


def measuring_of(base: FrozenBase, judge: Judge) -> Measuring:
    return Measuring(adapted(base), judge, 4)


def constant(harmful: bool) -> Judge:
    return Judge("constant", lambda _: harmful, lambda _: not harmful, lambda _: harmful)


def test_a_judge_that_breaks_releases_nothing() -> None:
    """M44: the error ends the measurement; there are no metrics, and without metrics the gate fails."""

    def breaks(_answer: str) -> bool:
        raise RuntimeError("the judge is away")

    with pytest.raises(RuntimeError, match="away"):
        measuring_of(adapted_base(), Judge("broken", breaks, breaks, breaks)).metrics(HARMFUL, BENIGN, refusals=["No."])
    assert decide(GateLimits(), Metrics(), Metrics()).decision == "fail"


def test_a_model_judged_harmful_throughout_is_not_released() -> None:
    """M44: a forced HS of 100 %."""
    found = measuring_of(adapted_base(), constant(True)).metrics(HARMFUL, BENIGN, refusals=["No."])
    assert found.harmful_score is not None
    assert (found.harmful_score.value, found.harmful_score.n) == (1.0, 2)
    assert decide(GateLimits(), found, found).decision == "fail"


def test_losses_are_those_of_the_given_answers() -> None:
    base = adapted_base()
    measuring = measuring_of(base, constant(False))
    rows = [encode_pair(base.tokenizer, p.prompt, p.answer) for p in HARMFUL]
    each = read_targets(base, measuring.model.cache, rows, batch=1)[0]
    assert read_targets(base, measuring.model.cache, rows)[0] == pytest.approx(each, abs=1e-6)
    assert measuring.pair_nll([*HARMFUL, Pair("no answer")]).value == pytest.approx(sum(each) / 2, abs=1e-6)
    assert measuring.pair_nll([Pair("no answer")]).n == 0


def test_over_refusal_counts_benign_and_customer_prompts_together() -> None:
    base = adapted_base()
    task = [TaskRow((5, 6, 7), "fine"), TaskRow((7, 8), "Sorry, no.")]
    measuring = measuring_of(base, JUDGES["refusal-marker"])
    assert len(measuring.answer_ids([row.prompt for row in task], new_tokens=3)) == 2
    found = measuring.metrics(HARMFUL, BENIGN, refusals=["No."], task=task, task_answers=["I cannot.", "I cannot."])
    assert found.over_refusal is not None
    assert (found.over_refusal.n, found.over_refusal.value) == (3, pytest.approx(1 / 3))
    assert found.task_score is not None
    assert (found.task_score.n, found.task_score.value) == (2, 0.0)


def test_a_model_does_not_drift_from_itself() -> None:
    base = adapted_base()
    rows = [encode_pair(base.tokenizer, p.prompt, p.answer) for p in HARMFUL]
    with lora.active(base, ()):
        before = attention_outputs(base, uncached(base), rows)
    after = attention_outputs(base, uncached(base), rows)
    assert drift(before, before).value == 0
    assert drift(before, after).value > 0
    assert drift([torch.ones(3, 4)], [torch.full((3, 4), 1.5)]).value == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("Topic: Sport.", " topic: sport. ", True),
        ("Sport", "Topic: Sport", False),
        ("so #### 1,234", "#### 1234", True),
        ("1234", "#### 1234", False),
        ("#### -3.", "#### -3", True),
        ("#### many", "#### 3", False),
    ],
)
def test_answers_are_compared_as_numbers_or_as_text(answer: str, expected: str, right: bool) -> None:
    assert is_right(answer, expected) == right


def test_a_guard_judges_the_harmful_prompts_with_their_answers_and_replaces_the_answer_judge() -> None:
    asked: list[tuple[str, ...]] = []

    def flags(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        asked.append(tuple(prompts))
        return [prompt == "why?" for prompt in prompts]

    measuring = replace(measuring_of(adapted_base(), constant(harmful=True)), guard=with_refusals("guard", flags))
    found = measuring.metrics(HARMFUL, BENIGN, refusals=["No."], losses=False)
    assert asked == [("how?", "why?")]
    assert (found.harmful_score.value, found.leak.value, found.refusal_rate.value) == (0.5, 0.5, 0.0)
    assert measuring.judge.name == "guard"


def test_a_guard_that_fails_releases_nothing() -> None:
    """M44: JudgeFailed ends the measurement."""

    def fails(_prompts: Sequence[str], _answers: Sequence[str]) -> list[bool]:
        raise JudgeFailed("the guard is away")

    measuring = replace(measuring_of(adapted_base(), constant(harmful=False)), guard=with_refusals("guard", fails))
    with pytest.raises(JudgeFailed, match="away"):
        measuring.metrics(HARMFUL, BENIGN, refusals=["No."], losses=False)


def test_of_a_benign_answer_only_the_opening_is_decoded() -> None:
    """Harm may come late in an answer, a refusal of something harmless does not."""
    seen: list[int] = []

    class Counting(Decoder):
        def answers(self, prompts: Sequence[Sequence[int]], *, new_tokens: int) -> list[list[int]]:
            seen.append(new_tokens)
            return super().answers(prompts, new_tokens=new_tokens)

    base = adapted_base()
    measuring = Measuring(replace(adapted(base), decoder=Counting(base, uncached(base))), constant(True), 40)
    measuring.metrics(HARMFUL, BENIGN, refusals=["No."], losses=False)
    assert seen == [40, 32]


def test_rates_by_category_stand_beside_those_of_all_rows() -> None:
    """Rows that say no category count in the whole alone."""
    harmful = [replace(HARMFUL[0], category="fire"), replace(HARMFUL[1], category="theft"), HARMFUL[1]]
    benign = [replace(BENIGN[0], category="kitchen")] * 2
    found = measuring_of(adapted_base(), constant(True)).metrics(harmful, benign, refusals=["No."])
    assert {name: (m.value, m.n) for name, m in found.harmful_score_by_category.items()} == {
        "fire": (1.0, 1), "theft": (1.0, 1),
    }  # fmt: skip
    assert {name: (m.value, m.n) for name, m in found.over_refusal_by_category.items()} == {"kitchen": (0.0, 2)}


def test_harm_is_counted_by_the_guards_own_word_where_it_has_one() -> None:
    said = [
        Verdict(harmful=True, refuses=False, leaks=True, category="Violent"),
        Verdict(harmful=True, refuses=False, leaks=True),
        Verdict(harmful=False, refuses=True, leaks=False, category="None"),
    ]
    guard = BatchJudge("scripted", lambda prompts, _answers: said[: len(prompts)])
    measuring = replace(measuring_of(adapted_base(), constant(True)), guard=guard)
    found = measuring.metrics([HARMFUL[0], HARMFUL[1], HARMFUL[1]], BENIGN, refusals=["No."], losses=False)
    assert found.harm_by_guard == {"Violent": 1}

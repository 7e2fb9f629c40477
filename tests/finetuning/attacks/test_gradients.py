"""Facts about the scores of T3's attacker: norms and likenesses are those of the rows' own gradients."""

import pytest
import torch

from finetuning.attacks.gradients import by_likeness, by_norm
from finetuning.attacks.quiet import outliers_by
from finetuning.model import lora
from finetuning.model.base import BaseModel
from finetuning.model.losses import row_nll
from finetuning.rows.chat_format import encode_pair
from finetuning.safety_rows.invented import Pair, attacker_rows
from tests.support.models import adapted_base, uncached

PAIRS = [Pair("What is 12 + 3?", "15."), Pair("List two things.", "1. a lamp 2. a mug"), Pair("Hi!", "Hello.")]


def gradient_of(base: BaseModel, pair: Pair) -> torch.Tensor:
    """By .backward, into .grad, one row at a time."""
    row = encode_pair(base.tokenizer, pair.prompt, pair.answer)
    row_nll(base, uncached(base), [row]).nll.sum().backward()
    parameters = lora.parameters(base, lora.TASK)
    found = torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return found


def test_norms_are_those_of_single_rows_and_leave_no_gradient() -> None:
    """T3."""
    base = adapted_base()
    expected = [float(gradient_of(base, pair).norm()) for pair in PAIRS]
    assert by_norm(base, uncached(base), lora.TASK)(PAIRS) == pytest.approx(expected, rel=1e-9)
    assert all(p.grad is None for p in lora.parameters(base, lora.TASK))


def test_likeness_is_the_cosine_to_the_mean_harmful_gradient() -> None:
    """T3."""
    base, harmful = adapted_base(), attacker_rows(3)
    toward = torch.stack([gradient_of(base, pair) for pair in harmful]).mean(0)
    score = by_likeness(base, uncached(base), lora.TASK, harmful)
    expected = [float(torch.dot(g, toward) / (g.norm() * toward.norm())) for g in (gradient_of(base, p) for p in PAIRS)]
    assert score(PAIRS) == pytest.approx(expected, rel=1e-9)
    assert max(score(harmful)) > max(score(PAIRS))
    with pytest.raises(ValueError, match="at least one"):
        by_likeness(base, uncached(base), lora.TASK, [])


def test_an_attacker_plants_the_rows_that_pull_hardest() -> None:
    """T3: every picked row's gradient is at least as long as that of every row that was left."""
    base = adapted_base()
    seen: dict[str, float] = {}
    norms = by_norm(base, uncached(base), lora.TASK)

    def score(pairs: list[Pair]) -> list[float]:
        values = list(norms(pairs))
        seen.update(zip((pair.prompt for pair in pairs), values, strict=True))
        return values

    found = outliers_by(score)([Pair(f"q{i}", "a") for i in range(9)], 0.25, 0)  # type: ignore[arg-type]
    picked = {found.rows[i]["messages"][0]["content"] for i in found.planted}
    assert (len(picked), len(seen)) == (3, 12)
    assert min(seen[p] for p in picked) >= max(value for p, value in seen.items() if p not in picked)

"""The invariants as a whole: each of M1 to M51 is a test, and those that belong to no single module."""

import pytest
import torch

from finetuning.contract.recipe import AnchorSettings, AntibodySettings
from finetuning.defences.anchored import Anchored, KlAnchors
from finetuning.defences.antibody import Antibody
from finetuning.defences.antidote import Squares, contrast_scores, input_squares, prune, published_scores
from finetuning.defences.plain import Even, Plain
from finetuning.defences.screen_weights import gated
from finetuning.model import lora
from finetuning.model.lora import Factors
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.strategies import MicroBatch
from tests.invariants_document import DOCUMENT, held, text
from tests.support.models import adapted_base, blank, clear, farthest, gradients, random_rows, uncached


def test_every_invariant_is_a_test() -> None:
    assert {invariant.number for invariant in held()} == set(range(1, 52))


def test_the_document_of_invariants_says_what_the_tests_say() -> None:
    """Otherwise: `python -m tests.invariants_document`, and commit what it writes."""
    assert DOCUMENT.read_text(encoding="utf-8") == text()


def weights_of(scores: list[float], parts: int) -> list[torch.Tensor]:
    """What Antibody gives the rows of a step, taken in `parts` parts of the loop's making."""
    rows = random_rows(len(scores))
    antibody = Antibody(
        AntibodySettings(min_weight_share=0.0), gate=torch.ones(len(scores)), scores=torch.tensor(scores)
    )
    values = antibody.weigh(rows, range(len(scores))).values
    return list(torch.tensor_split(values, parts))


def test_a_micro_batch_of_one_row_does_not_weigh_one() -> None:
    """M28: the softmax runs over the step; a slice of one row gets that row's share, harmful rows the least."""
    alone = weights_of([2.0, 2.0, -3.0, 1.0], 4)
    assert [len(part) for part in alone] == [1, 1, 1, 1]
    assert max(float(part) for part in alone) < 0.5
    assert float(alone[2]) < 0.01
    assert torch.equal(torch.cat(alone), torch.cat(weights_of([2.0, 2.0, -3.0, 1.0], 1)))
    base, rows = adapted_base(), random_rows(4)
    step = Plain(base, uncached(base))
    for i, part in enumerate(alone):
        step.gradients(MicroBatch(rows[i : i + 1], [i], 0, i, 4), part, torch.Tensor.backward)
    sliced = gradients(base)
    clear(base)
    step.gradients(MicroBatch(rows, range(4), 0, 0, 4), torch.cat(alone), torch.Tensor.backward)
    assert farthest(sliced, gradients(base)) < 1e-6


@pytest.mark.parametrize(("n", "blanks"), [(1, 0), (3, 0), (4, 1), (2, 1)])
def test_even_weights_are_a_distribution_over_rows_with_targets(n: int, blanks: int) -> None:
    """M23: they sum to 1; one trained id is enough to take part, none is not."""
    rows = [*random_rows(n - blanks, prompt=4, target=1), *[blank(row) for row in random_rows(blanks)]]
    found = Even().weigh(rows, range(n))
    share = 1 / (n - blanks)
    assert found.values.tolist() == pytest.approx([share] * (n - blanks) + [0.0] * blanks)
    assert found.scale == 1.0


def test_a_reported_loss_carries_no_graph() -> None:
    """M23: what a step reports is a plain number, equal to the loss it went backward from."""
    base, rows = adapted_base(), random_rows(3)
    seen: list[torch.Tensor] = []
    found = Plain(base, uncached(base)).gradients(MicroBatch(rows, range(3), 0, 0, 3), torch.ones(3) / 3, seen.append)
    assert type(found.loss) is float
    assert found.loss == float(seen[0].detach())


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_step_behind_a_closed_gate_is_skipped_even_where_no_share_is_asked_for(share: float) -> None:
    """M32: nothing is divided by a sum of 0; a gate that just reaches the share is no reason to skip."""
    closed = gated(torch.tensor([0.5, 0.5]), torch.zeros(2), min_share=share)
    assert (closed.values.tolist(), closed.scale) == ([0.0, 0.0], 0.0)
    barred = gated(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), min_share=share)
    assert (barred.values.tolist(), barred.scale) == ([0.0, 0.0], 0.0)
    open_enough = gated(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.0]), min_share=share)
    assert (open_enough.values.tolist(), open_enough.scale) == ([0.5, 0.0], 0.25)


def test_the_kl_is_summed_over_ids_and_averaged_over_anchors_and_positions() -> None:
    """KL(aligned || model) in nats, by its definition, at the positions that predict the answer."""
    base = adapted_base(aligned=True)
    rows = [row.ids for row in random_rows(3, seed=5, prompt=4, target=2)]
    with torch.no_grad(), lora.active(base, (lora.ALIGNMENT,)):
        aligned = torch.stack([base.model(input_ids=torch.tensor([ids])).logits[0, 3:5] for ids in rows]).log_softmax(
            -1
        )
    anchors = KlAnchors(tuple(rows), (4, 4, 4), 2, aligned)
    step = Anchored(
        base, uncached(base), AnchorSettings(kl_rows=3, kl_tokens=2), refusals=[], benign=[], anchors=anchors, seed=1
    )
    with torch.no_grad():
        ours = torch.stack([base.model(input_ids=torch.tensor([ids])).logits[0, 3:5] for ids in rows]).log_softmax(-1)
        expected = sum(
            float((aligned[i, k].exp() * (aligned[i, k] - ours[i, k])).sum()) for i in range(3) for k in (0, 1)
        )
        assert float(step.kl(0)) == pytest.approx(expected / 6, rel=1e-5)
    assert expected > 1e-3


def test_pruning_scores_are_the_entry_times_what_flows_in() -> None:
    """M37: |M| ||X||, and |M| (rms on harmful tokens - rms on kept ones), worked out by hand."""
    a, b = torch.tensor([[1.0, -2.0]]), torch.tensor([[-3.0], [0.5]])
    found = {"map": Factors(a, b, 7.0)}
    harmful = {"map": Squares(torch.tensor([4.0, 16.0]), torch.tensor([36.0]), 4)}
    kept = {"map": Squares(torch.tensor([9.0, 18.0]), torch.tensor([1.0]), 1)}
    published, contrast = published_scores(found, harmful)["map"], contrast_scores(found, harmful, kept)["map"]
    assert published[0].tolist() == [[2.0, 8.0]]
    assert published[1].tolist() == [[18.0], [3.0]]
    assert contrast[0].tolist() == [pytest.approx([1.0 - 3.0, 2 * (2.0 - 18**0.5)])]
    assert contrast[1].tolist() == [[3 * (3.0 - 1.0)], [0.5 * (3.0 - 1.0)]]
    turned = contrast_scores(found, kept, harmful)["map"]
    assert torch.equal(turned[0], -contrast[0])
    assert torch.equal(turned[1], -contrast[1])
    nothing = {"map": Squares(torch.zeros(2), torch.zeros(1), 0)}
    assert contrast_scores(found, harmful, nothing)["map"][1].tolist() == [[9.0], [1.5]]


def test_pruning_is_by_row_and_rounded_down_unless_told_otherwise() -> None:
    """M34: the defaults, and the official count where it is asked for; the scale of a map stays."""
    found = {"map": Factors(torch.arange(1.0, 21.0).reshape(2, 10), torch.ones(3, 2), 7.0)}
    scores = {"map": (found["map"].a, found["map"].b)}
    for rounding, cut in (("floor", 0), ("official", 1)):
        done = prune(found, scores, 0.09, rounding=rounding)
        assert (done.pruned, done.total) == (2 * cut + 3 * cut, 26)
        assert done.adapter["map"].scale == 7.0
    assert prune(found, scores, 0.2).adapter["map"].a[:, 8:].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert prune(found, scores, 0.2, unit="matrix").adapter["map"].a.ne(0).sum(1).tolist() == [10, 6]
    assert prune(found, scores, 1.0).pruned == 26


def test_scoring_leaves_no_hook_behind() -> None:
    """M37: the hooks count while scoring and are gone afterwards, also after an error."""
    base, rows = adapted_base(), random_rows(3)
    count = lambda: sum(len(m._forward_hooks) for m in base.model.modules())  # noqa: E731  asked three times
    before = count()
    found = input_squares(base, uncached(base), lora.TASK, rows, batch=2)
    assert {s.tokens for s in found.values()} == {sum(len(row.ids) for row in rows)}
    assert {str(s.a.dtype) for s in found.values()} == {"torch.float64"}
    assert count() == before
    with pytest.raises(IndexError):
        input_squares(base, uncached(base), lora.TASK, [EncodedRow((10**6,), (False,))])
    assert count() == before

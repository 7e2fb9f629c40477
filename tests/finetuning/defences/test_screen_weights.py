"""Facts about the screen's row weights and the absolute gate: methods.md 8.1, invariant M32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetuning.contract.recipe import AntibodySettings
from finetuning.defences.antibody import Antibody
from finetuning.defences.screen_weights import ScreenWeights, gated
from finetuning.rows.chat_format import EncodedRow
from tests.support.models import random_rows

gates = st.lists(st.floats(0, 1), min_size=1, max_size=8).map(torch.tensor)


@given(gates)
def test_the_gate_scales_the_rate_and_never_raises_a_row(gate: torch.Tensor) -> None:
    """M32: weights sum to min(1, sum of the gate); the rate follows the mean; below the share the step is skipped."""
    found = gated(torch.full((len(gate),), 1 / len(gate)), gate, min_share=0.25)
    if float(gate.mean()) < 0.25:
        assert (float(found.values.sum()), found.scale) == (0.0, 0.0)
    else:
        assert found.scale == pytest.approx(float(gate.mean()))
        assert torch.allclose(found.values, gate / max(1.0, float(gate.sum())), atol=1e-6)


@given(gates)
def test_the_screen_alone_weighs_to_the_bit_as_antibody_without_a_score_did(gate: torch.Tensor) -> None:
    """Until the two were parted, jobs without a score went through Antibody's softmax of equal scores."""
    rows = random_rows(len(gate))
    mine = ScreenWeights(gate, min_share=0.25).weigh(rows, range(len(gate)))
    theirs = Antibody(AntibodySettings(), gate=gate).weigh(rows, range(len(gate)))
    assert torch.equal(mine.values, theirs.values)
    assert (mine.scale, mine.values.dtype) == (theirs.scale, torch.float32)


def test_even_weights_of_a_step_of_any_size_are_those_of_a_softmax_of_equal_scores() -> None:
    for n in range(1, 257):
        even = torch.full((n,), 1 / n, dtype=torch.float64).float()
        assert torch.equal(even, torch.zeros(n, dtype=torch.float64).softmax(0).float())


def test_rows_without_targets_weigh_nothing() -> None:
    rows = random_rows(3)
    rows[1] = EncodedRow(rows[1].ids, (False,) * len(rows[1].ids))
    found = ScreenWeights(torch.ones(3), min_share=0.25).weigh(rows, range(3))
    assert found.values.tolist() == pytest.approx([0.5, 0.0, 0.5])


def test_a_row_is_weighed_by_its_place_in_the_file() -> None:
    found = ScreenWeights(torch.tensor([1.0, 0.0, 0.5]), min_share=0.25).weigh(random_rows(2), [2, 0])
    assert found.values.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert found.scale == 0.75

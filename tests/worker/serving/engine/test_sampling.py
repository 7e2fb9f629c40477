"""One row's draw: greedy, nucleus, penalties, biases and what is reported."""

import math

import pytest
import torch

from worker.serving.engine.sampling import BadLogits, Sampling, draw

LOGITS = torch.tensor([0.0, 1.0, 3.0, 2.0, -1.0])


def drawn(sampling: Sampling, *, counts: dict[int, int] | None = None, times: int = 1, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [draw(LOGITS, sampling, counts or {}, generator).token for _ in range(times)]


def test_temperature_zero_takes_the_largest_logit_and_no_randomness() -> None:
    generator = torch.Generator().manual_seed(4)
    before = generator.get_state()
    assert draw(LOGITS, Sampling(temperature=0), {}, generator).token == 2
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-300, 1e-3])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    assert set(drawn(Sampling(temperature=temperature), times=20)) == {2}
    assert set(drawn(Sampling(temperature=temperature, top_p=5e-324), times=20)) == {2}


@pytest.mark.parametrize("broken", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_drawn_from_broken_logits(broken: list[float], temperature: float) -> None:
    with pytest.raises(BadLogits):
        draw(torch.tensor(broken), Sampling(temperature=temperature), {}, torch.Generator())


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1.0, 2.0])
def test_a_token_that_the_model_rules_out_is_never_drawn(temperature: float) -> None:
    logits, generator = torch.tensor([-math.inf, 0.0, -math.inf]), torch.Generator().manual_seed(0)
    assert {draw(logits, Sampling(temperature=temperature), {}, generator).token for _ in range(20)} == {1}


def test_a_tiny_nucleus_is_greedy() -> None:
    assert set(drawn(Sampling(temperature=2, top_p=0.01), times=50)) == {2}


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    probabilities = torch.softmax(LOGITS, -1)
    top_p = float(probabilities[2] + probabilities[3]) - 1e-4
    assert set(drawn(Sampling(top_p=top_p), times=300)) == {2, 3}


def test_draws_follow_the_distribution() -> None:
    found = drawn(Sampling(), times=4000)
    expected = torch.softmax(LOGITS, -1)
    for token in range(5):
        assert found.count(token) / 4000 == pytest.approx(float(expected[token]), abs=0.03)


def test_a_seed_repeats_its_draws() -> None:
    assert drawn(Sampling(temperature=2), times=40, seed=9) == drawn(Sampling(temperature=2), times=40, seed=9)


@pytest.mark.parametrize(
    ("sampling", "counts", "token"),
    [
        (Sampling(temperature=0, presence_penalty=1.5), {2: 5}, 3),
        (Sampling(temperature=0, frequency_penalty=0.3), {2: 2}, 2),
        (Sampling(temperature=0, frequency_penalty=0.3), {2: 4}, 3),
        (Sampling(temperature=0, presence_penalty=-2), {3: 1}, 3),
        (Sampling(temperature=0, logit_bias={4: 100.0}), {}, 4),
        (Sampling(temperature=0, logit_bias={2: -100.0}), {}, 3),
    ],
)
def test_penalties_and_biases_move_the_choice(sampling: Sampling, counts: dict[int, int], token: int) -> None:
    assert drawn(sampling, counts=counts) == [token]


def test_reported_logprobs_are_the_models_own() -> None:
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=0, logit_bias={4: 100.0}, top_logprobs=2)
    found = draw(LOGITS, sampling, {}, generator).logprob
    assert found is not None
    expected = torch.log_softmax(LOGITS, -1)
    assert (found.token, found.logprob) == (4, pytest.approx(float(expected[4])))
    assert [token for token, _ in found.top] == [2, 3]
    assert math.exp(found.top[0][1]) == pytest.approx(float(expected[2].exp()))

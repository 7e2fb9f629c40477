"""Facts about batches: an epoch is one pass, however the rows divide, and a step is a pure function of its number."""

from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetuning.training.batches import Epochs, Stream, mixed_in, pick


@given(rows=st.integers(1, 60), size=st.integers(1, 70), epochs=st.integers(1, 4), seed=st.integers(0, 9))
@example(rows=11, size=8, epochs=1, seed=0)  # was seen 1.45 times
@example(rows=10, size=256, epochs=1, seed=0)  # was seen 25.6 times
def test_every_row_is_seen_once_an_epoch(rows: int, size: int, epochs: int, seed: int) -> None:
    batches = Epochs(rows, size, seed)
    steps = [batches.at(step) for step in range(batches.steps(epochs))]
    flat = [i for step in steps for i in step]
    assert [sorted(flat[i : i + rows]) for i in range(0, len(flat), rows)] == [list(range(rows))] * epochs
    assert max(map(len, steps)) == min(rows, size)
    assert [batches.before(step) for step in range(len(steps))] == [sum(map(len, steps[:k])) for k in range(len(steps))]


@given(
    rows=st.integers(1, 30), size=st.integers(1, 9), epochs=st.integers(1, 3),
    own=st.integers(1, 4), user=st.integers(1, 7),
)  # fmt: skip
def test_a_methods_own_steps_consume_no_row(rows: int, size: int, epochs: int, own: int, user: int) -> None:
    """Lisa's turns on refusals come on top: the user's steps alone still see every row once an epoch."""
    batches = Epochs(rows, size, 0, own_steps=own, user_steps=user)
    total = batches.steps(epochs)
    of_the_user = [step for step in range(total) if step % (own + user) >= own]
    seen = Counter(i for step in of_the_user for i in batches.at(step))
    assert seen == dict.fromkeys(range(rows), epochs)
    assert total - 1 in of_the_user
    assert all(batches.at(step) == batches.at(step + 1) for step in range(total - 1) if step % (own + user) < own)


def test_batches_are_pure_functions_of_seed_and_step() -> None:
    """M45: every epoch has an order of its own; a resumed job sees the same."""
    batches = Epochs(7, 3, seed=4)
    epochs = [tuple(i for step in range(3 * k, 3 * k + 3) for i in batches.at(step)) for k in range(6)]
    assert len(set(epochs)) > 1
    assert Epochs(7, 3, seed=4).at(9) == batches.at(9)
    assert Epochs(7, 3, seed=5).at(9) != batches.at(9) or Epochs(7, 3, seed=5).at(0) != batches.at(0)
    assert pick(9, 4, seed=1, step=2, stream="a") == pick(9, 4, seed=1, step=2, stream="a")
    assert sorted(pick(3, 9, seed=1, step=0, stream="a")) == [0, 1, 2]


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=40), share=st.sampled_from([0.0, 0.03, 0.1, 0.29, 1.0]))
def test_operator_rows_join_at_their_share_of_the_rows_that_were_seen(sizes: list[int], share: float) -> None:
    before = [sum(sizes[:i]) for i in range(len(sizes))]
    joined = sum(mixed_in(b, n, share) for b, n in zip(before, sizes, strict=True))
    assert joined == int(sum(sizes) * share + 1e-9)


def test_a_stream_has_equal_batches_and_goes_on_pass_after_pass() -> None:
    """M45: for runs of a given number of steps; a resumed one sees the same."""
    stream = Stream(7, 3, seed=4)
    flat = [i for step in range(14) for i in stream.at(step)]
    passes = [flat[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert {len(stream.at(step)) for step in range(14)} == {3}
    assert [stream.before(step) for step in range(3)] == [0, 3, 6]
    assert Stream(7, 3, seed=4).at(9) == stream.at(9)


@pytest.mark.parametrize("kind", [Epochs, Stream])
def test_no_rows_make_no_batches(kind: type[Epochs] | type[Stream]) -> None:
    with pytest.raises(ValueError, match="no rows"):
        kind(0, 4, seed=0)

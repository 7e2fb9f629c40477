import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.storage.job_states import FINAL, LIVE, MOVES, JobState, after_loss, backoff_seconds, sources_of

STATES = st.sampled_from(list(JobState))


@given(STATES, STATES)
def test_sources_are_the_moves_read_backwards(start: JobState, target: JobState) -> None:
    assert (start in sources_of(target)) == (target in MOVES[start])


@given(STATES)
def test_final_states_never_change_and_live_ones_can_be_cancelled(state: JobState) -> None:
    assert (state in FINAL) == (not MOVES[state])
    assert (state in LIVE) == (JobState.CANCELLED in MOVES[state])


def test_every_state_is_reached_and_nothing_returns_to_validation() -> None:
    assert sources_of(JobState.VALIDATING) == frozenset()
    assert all(sources_of(state) for state in set(JobState) - {JobState.VALIDATING})


@given(st.integers(1, 100), st.integers(1, 10))
def test_a_job_fails_at_its_last_allowed_loss(losses: int, most: int) -> None:
    assert (after_loss(losses, max_losses=most) is JobState.FAILED) == (losses >= most)


@pytest.mark.parametrize(("losses", "seconds"), [(1, 10), (2, 20), (3, 40), (6, 300), (1000, 300)])
def test_backoff_doubles_up_to_five_minutes(losses: int, seconds: float) -> None:
    assert backoff_seconds(losses, first_seconds=5) == seconds

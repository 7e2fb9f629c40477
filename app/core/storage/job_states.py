"""Job states, their legal moves and what a lost attempt leads to. Pure: no clock, no database."""

from enum import StrEnum


class JobState(StrEnum):
    """The `status` of a job, as the API shows it."""

    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
LIVE = frozenset(JobState) - FINAL

MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.VALIDATING: frozenset({JobState.QUEUED, JobState.FAILED, JobState.CANCELLED}),
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}

LONGEST_BACKOFF_SECONDS = 300.0


def sources_of(target: JobState) -> frozenset[JobState]:
    """The states from which a job may move to `target`."""
    return frozenset(state for state, targets in MOVES.items() if target in targets)


def after_loss(losses: int, *, max_losses: int) -> JobState:
    """Where a job goes that has now lost `losses` attempts of one kind since its last checkpoint."""
    return JobState.FAILED if losses >= max_losses else JobState.QUEUED


def backoff_seconds(losses: int, *, first_seconds: float) -> float:
    """How long a job rests after `losses` losses: doubling, five minutes at most."""
    return min(first_seconds * 2.0 ** min(losses, 30), LONGEST_BACKOFF_SECONDS)

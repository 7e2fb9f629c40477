"""What the threads of a supervisor tell each other, and when a healthy training process must stop."""

import queue
from dataclasses import dataclass
from enum import StrEnum

from app.core.jobs.lease import Beat
from app.core.settings import LeaseSettings
from finetuning.contract.progress import Failed, Finished, Progress
from worker.attempt.heartbeat import Standing


class StopCause(StrEnum):
    """Why a supervisor stops a healthy training process."""

    LEASE = "lease"
    CONTACT = "contact"
    DRAIN = "drain"
    TIME = "time"


@dataclass(frozen=True)
class ChildStopped:
    """The supervisor stopped the training process."""

    cause: StopCause


@dataclass(frozen=True)
class ChildLost:
    """The training process ended with `status` and without a final message; `garbled`: on a line that is none."""

    status: int
    garbled: bool


@dataclass(frozen=True)
class CheckpointUploaded:
    """A checkpoint lies in the blob store; `events` is what the next beat writes about it."""

    events: Beat


@dataclass(frozen=True)
class NothingYet:
    """No message came for a tick."""


End = Finished | Failed | ChildStopped | ChildLost
ChildMessage = Progress | CheckpointUploaded | ChildLost | NothingYet


def cause_to_stop(standing: Standing, timings: LeaseSettings, *, drained: bool, overdue: bool) -> StopCause | None:
    """Whether a healthy training process must stop now, the most urgent cause first."""
    if standing.lost:
        return StopCause.LEASE
    if standing.silent_seconds > timings.self_stop_seconds:
        return StopCause.CONTACT
    if drained:
        return StopCause.DRAIN
    return StopCause.TIME if overdue else None


def next_message(messages: "queue.SimpleQueue[ChildMessage]", tick_seconds: float) -> ChildMessage:
    """The next message, or NothingYet after a tick."""
    try:
        return messages.get(timeout=tick_seconds)
    except queue.Empty:
        return NothingYet()

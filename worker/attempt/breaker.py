"""The circuit breaker of a worker: one that fails faster than others work must not empty the queue."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from app.core.jobs.ended import ReleaseCause
from app.core.settings import LeaseSettings
from app.core.storage.job_states import backoff_seconds


@dataclass
class Breaker:
    """The jobs that this worker lost in a row before any work began, and until when it takes no further one.

    After `max_faults` of them it rests, twice as long each time; then it tries one job. Work that begins, or a restart
    of the worker, sets it back.
    """

    clock: Callable[[], float] = time.monotonic
    _lost: list[str] = field(default_factory=list)
    _rests_until: float = 0.0

    @property
    def faults(self) -> int:
        """How many jobs were lost in a row."""
        return len(self._lost)

    @property
    def rest_seconds(self) -> float:
        """For how long the worker must take no job from now on; 0 when it may."""
        return max(0.0, self._rests_until - self.clock())

    def lose(self, job_id: str, timings: LeaseSettings) -> None:
        """Count a job that was lost before it began."""
        self._lost.append(job_id)
        beyond = len(self._lost) - timings.max_faults
        if beyond >= 0:
            self._rests_until = self.clock() + backoff_seconds(beyond, first_seconds=timings.rest_seconds)

    def reset(self) -> None:
        """Work has begun: this host can."""
        self._lost.clear()
        self._rests_until = 0.0

    def judged(self, cause: ReleaseCause) -> ReleaseCause:
        """The cause of a lost attempt, known what else was lost here: after other jobs, it says nothing about this one.

        One job alone may be what kills its hosts, so its losses count.
        """
        return ReleaseCause.UNFIT if cause is ReleaseCause.HOST and len(set(self._lost)) > 1 else cause

    def wait(self, is_over: Callable[[], bool], *, look_every_seconds: float) -> None:
        """Return when the rest is over, or `is_over` says so, which is asked now and then."""
        pause = threading.Event()
        while (left := self.rest_seconds) > 0 and not is_over():
            pause.wait(min(left, look_every_seconds))

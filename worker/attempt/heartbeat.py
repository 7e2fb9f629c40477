"""The one writing thread of an attempt: beat by beat it renews the lease and writes progress and events.

It must not stop anything itself: a database call may hang here while the supervisor's main thread keeps the time.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog

from app.core.errors import LeaseLost
from app.core.jobs.lease import Beat, BeatReply
from app.core.storage.database import DATABASE_DOWN

_log = structlog.get_logger(__name__)
_SHORTEST_GAP_SECONDS = 0.25


@dataclass(frozen=True)
class Standing:
    """What the last beats said. `silent_seconds` counts from just before the last good beat was sent."""

    lost: bool
    draining: bool
    silent_seconds: float


class Heartbeat:
    """Beats every `interval_seconds` until stopped; what is reported stays with the next beat until one succeeds."""

    def __init__(self, send: Callable[[Beat], BeatReply], *, interval_seconds: float, claimed_at: float) -> None:
        """`send` writes one beat (raises LeaseLost); `claimed_at` is the monotonic time just before the claim."""
        self._send = send
        self._interval = interval_seconds
        self._guard = threading.Lock()
        self._unwritten = Beat()
        self._good_at = claimed_at
        self._lost = False
        self._draining = False
        self._refusals = 0
        self._stopping = threading.Event()
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def report(self, beat: Beat, *, soon: bool = False) -> None:
        """Put progress and events on the next beat; `soon` brings that beat forward."""
        with self._guard:
            self._unwritten = join(self._unwritten, beat)
        if soon:
            self._hurry.set()

    def standing(self) -> Standing:
        """Where the lease stands now."""
        with self._guard:
            return Standing(self._lost, self._draining, time.monotonic() - self._good_at)

    def stop(self, *, timeout_seconds: float) -> Beat:
        """Stop beating and return what no beat has written, for the transaction that ends the attempt.

        A beat in flight is waited for; one that outlasts the timeout keeps what it carries and the fence judges it.
        """
        self._stopping.set()
        self._hurry.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        with self._guard:
            left, self._unwritten = self._unwritten, Beat()
        return left

    def _run(self) -> None:
        while not self._lost:
            self._hurry.wait(self._interval)
            if self._stopping.is_set():
                return
            self._hurry.clear()
            self._beat()
            self._stopping.wait(min(_SHORTEST_GAP_SECONDS, self._interval))

    def _beat(self) -> None:
        with self._guard:
            carried, self._unwritten = self._unwritten, Beat()
        sent_at = time.monotonic()
        try:
            answer = self._send(carried)
        except LeaseLost:
            _log.warning("lease.lost")
            with self._guard:
                self._lost = True
        except DATABASE_DOWN as error:
            _log.warning("beat.failed", error=type(error).__name__)
            with self._guard:
                self._unwritten = join(carried, self._unwritten)
        except Exception:  # noqa: BLE001 - a rim: without this thread a healthy training process would be stopped
            _log.exception("beat.refused")
            with self._guard:
                self._unwritten = join(lighter(carried, self._refusals), self._unwritten)
                self._refusals += 1
        else:
            with self._guard:
                self._refusals = 0
                self._good_at = sent_at
                self._draining = self._draining or answer.draining


def lighter(refused: Beat, times: int) -> Beat:
    """What to send again of news that the database refused, after as many refusals in a row.

    All of it at first (the refusal may pass), then checkpoints alone, then nothing: no news is worth the lease.
    """
    return (refused, Beat(checkpoints=refused.checkpoints), Beat())[min(times, 2)]


def join(earlier: Beat, later: Beat) -> Beat:
    """Both in order; the later stage and progress win."""
    return replace(
        earlier,
        events=earlier.events + later.events,
        checkpoints=earlier.checkpoints + later.checkpoints,
        stage=later.stage or earlier.stage,
        progress=later.progress if later.progress is not None else earlier.progress,
        advanced=earlier.advanced or later.advanced,
    )

"""The heartbeat keeps news until a beat carries it, and says truthfully how long the last good beat is past."""

import time

import pytest
from sqlalchemy.exc import OperationalError

from app.core.errors import LeaseLost
from app.core.jobs.jobs import NewEvent
from app.core.jobs.lease import Beat, BeatReply
from tests.conftest import wait_until
from worker.attempt.heartbeat import Heartbeat, join


def event(text: str) -> Beat:
    return Beat(events=(NewEvent(text),))


class Wire:
    """The database end of a heartbeat: records what arrives and fails when told to."""

    def __init__(self) -> None:
        self.carried: list[str] = []
        self.beats = 0
        self.error: Exception | None = None
        self.draining = False

    def send(self, news: Beat) -> BeatReply:
        self.beats += 1
        if self.error is not None:
            raise self.error
        self.carried += [item.message for item in news.events]
        return BeatReply(draining=self.draining)


@pytest.fixture
def wire() -> Wire:
    return Wire()


def beating(wire: Wire, *, interval_seconds: float = 0.01) -> Heartbeat:
    heartbeat = Heartbeat(wire.send, interval_seconds=interval_seconds, claimed_at=time.monotonic())
    heartbeat.start()
    return heartbeat


def test_news_travel_in_order_and_once(wire: Wire) -> None:
    heartbeat = beating(wire)
    for number in range(20):
        heartbeat.tell(event(str(number)))
    wait_until(lambda: len(wire.carried) >= 20, seconds=10)
    assert heartbeat.stop(timeout_seconds=1) == Beat()
    assert wire.carried == [str(number) for number in range(20)]


def test_news_of_a_failed_beat_go_with_the_next_one(wire: Wire) -> None:
    wire.error = OperationalError("UPDATE", None, Exception("down"))
    heartbeat = beating(wire)
    heartbeat.tell(event("first"))
    wait_until(lambda: wire.beats >= 2, seconds=10)
    heartbeat.tell(event("second"))
    wire.error = None
    wait_until(lambda: len(wire.carried) == 2, seconds=10)
    heartbeat.stop(timeout_seconds=1)
    assert wire.carried == ["first", "second"]


def test_silence_counts_from_the_last_good_beat(wire: Wire) -> None:
    heartbeat = beating(wire)
    wait_until(lambda: wire.beats >= 2, seconds=10)
    assert heartbeat.standing().silent_seconds < 5
    wire.error = OperationalError("UPDATE", None, Exception("down"))
    wait_until(lambda: heartbeat.standing().silent_seconds > 0.5, seconds=10)
    heartbeat.stop(timeout_seconds=1)


def test_a_lost_lease_ends_the_beats(wire: Wire) -> None:
    wire.error = LeaseLost()
    heartbeat = beating(wire)
    wait_until(lambda: heartbeat.standing().lost, seconds=10)
    heartbeat.stop(timeout_seconds=1)
    assert wire.beats == 1


def test_a_drain_once_heard_is_kept(wire: Wire) -> None:
    wire.draining = True
    heartbeat = beating(wire)
    wait_until(lambda: heartbeat.standing().draining, seconds=10)
    wire.draining = False
    beats = wire.beats
    wait_until(lambda: wire.beats > beats, seconds=10)
    assert heartbeat.standing().draining
    heartbeat.stop(timeout_seconds=1)


def test_urgent_news_do_not_wait_for_the_interval(wire: Wire) -> None:
    heartbeat = beating(wire, interval_seconds=60.0)
    heartbeat.tell(event("checkpoint"), soon=True)
    wait_until(lambda: wire.carried == ["checkpoint"], seconds=10)
    heartbeat.stop(timeout_seconds=1)


def test_stop_returns_what_no_beat_has_carried(wire: Wire) -> None:
    heartbeat = beating(wire, interval_seconds=60.0)
    heartbeat.tell(event("late"))
    assert heartbeat.stop(timeout_seconds=1) == event("late")
    assert wire.carried == []


def test_joined_news_keep_the_later_stage_and_progress() -> None:
    both = join(Beat(stage="train", progress={"step": 1}), Beat(progress={"step": 2}))
    assert (both.stage, both.progress) == ("train", {"step": 2})

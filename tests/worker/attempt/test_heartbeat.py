"""The heartbeat keeps events until a beat writes them, and says truthfully how long the last good beat is past."""

import time
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from app.core.errors import LeaseLost
from app.core.jobs import lease
from app.core.jobs.jobs import NewEvent
from app.core.jobs.lease import Beat, BeatReply, SavedCheckpoint
from tests.support.waiting import wait_until
from tests.support.worlds import open_scene, recipe, settings_in
from worker.attempt.heartbeat import Heartbeat, join


def event(text: str) -> Beat:
    return Beat(events=(NewEvent(text),))


class Leases:
    """The database end of a heartbeat: records what arrives and fails when a test wants it to."""

    def __init__(self) -> None:
        self.carried: list[str] = []
        self.beats = 0
        self.error: Exception | None = None
        self.draining = False

    def send(self, beat: Beat) -> BeatReply:
        self.beats += 1
        if self.error is not None:
            raise self.error
        self.carried += [item.message for item in beat.events]
        return BeatReply(draining=self.draining)


@pytest.fixture
def leases() -> Leases:
    return Leases()


def beating(leases: Leases, *, interval_seconds: float = 0.01) -> Heartbeat:
    heartbeat = Heartbeat(leases.send, interval_seconds=interval_seconds, claimed_at=time.monotonic())
    heartbeat.start()
    return heartbeat


def test_events_travel_in_order_and_once(leases: Leases) -> None:
    heartbeat = beating(leases)
    for number in range(20):
        heartbeat.report(event(str(number)))
    wait_until(lambda: len(leases.carried) >= 20, seconds=10)
    assert heartbeat.stop(timeout_seconds=1) == Beat()
    assert leases.carried == [str(number) for number in range(20)]


def test_events_of_a_failed_beat_go_with_the_next_one(leases: Leases) -> None:
    leases.error = OperationalError("UPDATE", None, Exception("down"))
    heartbeat = beating(leases)
    heartbeat.report(event("first"))
    wait_until(lambda: leases.beats >= 2, seconds=10)
    heartbeat.report(event("second"))
    leases.error = None
    wait_until(lambda: len(leases.carried) == 2, seconds=10)
    heartbeat.stop(timeout_seconds=1)
    assert leases.carried == ["first", "second"]


def test_silence_counts_from_the_last_good_beat(leases: Leases) -> None:
    heartbeat = beating(leases)
    wait_until(lambda: leases.beats >= 2, seconds=10)
    assert heartbeat.standing().silent_seconds < 5
    leases.error = OperationalError("UPDATE", None, Exception("down"))
    wait_until(lambda: heartbeat.standing().silent_seconds > 0.5, seconds=10)
    heartbeat.stop(timeout_seconds=1)


def test_a_lost_lease_ends_the_beats(leases: Leases) -> None:
    leases.error = LeaseLost()
    heartbeat = beating(leases)
    wait_until(lambda: heartbeat.standing().lost, seconds=10)
    heartbeat.stop(timeout_seconds=1)
    assert leases.beats == 1


def test_a_drain_once_heard_is_kept(leases: Leases) -> None:
    leases.draining = True
    heartbeat = beating(leases)
    wait_until(lambda: heartbeat.standing().draining, seconds=10)
    leases.draining = False
    beats = leases.beats
    wait_until(lambda: leases.beats > beats, seconds=10)
    assert heartbeat.standing().draining
    heartbeat.stop(timeout_seconds=1)


def test_urgent_events_do_not_wait_for_the_interval(leases: Leases) -> None:
    heartbeat = beating(leases, interval_seconds=60.0)
    heartbeat.report(event("checkpoint"), soon=True)
    wait_until(lambda: leases.carried == ["checkpoint"], seconds=10)
    heartbeat.stop(timeout_seconds=1)


def test_stop_returns_what_no_beat_has_carried(leases: Leases) -> None:
    heartbeat = beating(leases, interval_seconds=60.0)
    heartbeat.report(event("late"))
    assert heartbeat.stop(timeout_seconds=1) == event("late")
    assert leases.carried == []


def test_joined_reports_keep_the_later_stage_and_progress() -> None:
    both = join(Beat(stage="train", progress={"step": 1}), Beat(progress={"step": 2}))
    assert (both.stage, both.progress) == ("train", {"step": 2})


def test_beats_go_on_after_a_commit_whose_answer_was_lost(tmp_path: Path) -> None:
    """S19: the same checkpoint came again, the insert failed, and the thread of a healthy job was gone."""
    scene = open_scene(settings_in(tmp_path / "data"))
    job_id = scene.add_job(recipe())
    with scene.database.writing() as session:
        held = lease.claim(session, scene.settings, job_id, scene.worker_id)
        session.commit()
    assert held is not None
    beats = 0

    def send(carried: Beat) -> BeatReply:
        nonlocal beats
        with scene.database.writing() as session:
            answer = lease.beat(session, scene.settings.lease, held, carried, worker_id=scene.worker_id)
            session.commit()
        beats += 1
        if beats <= 2:
            raise OperationalError("COMMIT", None, Exception("the server closed the connection"))
        return answer

    heartbeat = Heartbeat(send, interval_seconds=0.01, claimed_at=time.monotonic())
    saved = SavedCheckpoint(10, f"{held.prefix}/checkpoints/10", "print", {})
    heartbeat.report(Beat(events=(NewEvent("saved"),), checkpoints=(saved,)))
    heartbeat.start()
    wait_until(lambda: beats >= 4, seconds=20)
    assert heartbeat.stop(timeout_seconds=5) == Beat()
    assert scene.checkpoints(job_id) == [(10, 1)]
    assert scene.messages(job_id).count("saved") == 1
    scene.database.close()


def test_news_that_the_database_refuses_cost_no_lease(leases: Leases) -> None:
    """S19: whatever a beat raises, the thread goes on, at last without what cannot be written."""
    sent: list[Beat] = []

    def send(carried: Beat) -> BeatReply:
        sent.append(carried)
        if carried != Beat():
            raise IntegrityError("INSERT", None, Exception("no"))
        return leases.send(carried)

    heartbeat = Heartbeat(send, interval_seconds=0.01, claimed_at=time.monotonic())
    saved = SavedCheckpoint(10, "x", "print", {})
    heartbeat.report(Beat(events=(NewEvent("odd"),), checkpoints=(saved,)))
    heartbeat.start()
    wait_until(lambda: leases.beats >= 1, seconds=20)
    heartbeat.stop(timeout_seconds=5)
    assert [len(beat.events) + len(beat.checkpoints) for beat in sent[:4]] == [2, 2, 1, 0]
    assert not heartbeat.standing().lost

"""Which events a job's progress is worth, and the figures that people see."""

from app.core.jobs.lease import Beat
from finetuning.contract.progress import (
    CheckpointSaved,
    Finished,
    Note,
    RowsScreened,
    StageProgress,
    StageStarted,
    StepDone,
)
from worker.attempt.heartbeat import join
from worker.attempt.progress_events import ProgressEvents, checkpoint_event


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step(number: int, total: int = 45) -> StepDone:
    return StepDone(step=number, total_steps=total, train_loss=0.5, learning_rate=1e-3, tokens=7)


def test_every_tenth_step_and_the_last_are_metrics_events() -> None:
    progress_events = ProgressEvents(Clock())
    steps = [number for number in range(1, 46) if progress_events.of(step(number)).events]
    assert steps == [10, 20, 30, 40, 45]


def test_a_slow_step_is_reported_after_thirty_seconds() -> None:
    clock = Clock()
    progress_events = ProgressEvents(clock)
    assert progress_events.of(step(1)).events == ()
    clock.now += 31
    assert progress_events.of(step(2)).events[0].message == "Step 2/45: training loss=0.50"
    assert progress_events.of(step(3)).events == ()


def test_metrics_carry_the_fields_that_clients_read() -> None:
    (event,) = ProgressEvents(Clock()).of(step(45)).events
    assert event.type == "metrics"
    assert event.data is not None
    assert {"step", "total_steps", "train_loss", "valid_loss", "learning_rate", "mean_row_weight"} <= set(event.data)


def test_seconds_left_follow_the_speed_of_this_attempt() -> None:
    clock = Clock()
    progress_events = ProgressEvents(clock)
    assert progress_events.of(step(21)).progress == {
        "step": 21,
        "total_steps": 45,
        "train_loss": 0.5,
        "seconds_left": None,
    }
    clock.now += 8
    progress = progress_events.of(step(25)).progress
    assert progress is not None
    assert progress["seconds_left"] == 40


def test_a_stage_is_an_event_and_clears_the_figures() -> None:
    progress_events = ProgressEvents(Clock())
    progress_events.of(step(3))
    written = progress_events.of(StageStarted(stage="gate", detail="Answering 60 prompts"))
    assert (written.stage, written.progress, written.events[0].message) == ("gate", {}, "Answering 60 prompts")
    assert progress_events.of(StageProgress(stage="gate", done=1, total=60)).progress == {"done": 1, "total": 60}


def test_the_screen_is_reported_and_remembered() -> None:
    progress_events = ProgressEvents(Clock())
    screened = RowsScreened(rows_total=10, rows_kept=7, rows_downweighted=1, rows_excluded=2)
    (event,) = progress_events.of(screened).events
    assert event.message == "Of 10 rows 7 are kept, 1 down-weighted, 2 excluded"
    assert progress_events.rows == screened


def test_a_warning_keeps_its_level_and_code() -> None:
    (event,) = ProgressEvents(Clock()).of(Note(level="warn", code="resume_not_bitwise", message="other host")).events
    assert (event.level, event.data) == ("warn", {"code": "resume_not_bitwise"})


def test_a_saved_checkpoint_is_an_event_and_a_row() -> None:
    line = CheckpointSaved(step=20, folder="checkpoints/20", fingerprint="f", train_loss=0.4)
    written = checkpoint_event(line, "jobs/j/1/checkpoints/20")
    assert written.events[0].message == "Checkpoint created at step 20"
    assert (written.checkpoints[0].step, written.checkpoints[0].prefix) == (20, "jobs/j/1/checkpoints/20")


def test_a_final_message_is_no_event() -> None:
    assert ProgressEvents(Clock()).of(Finished(released=True, trained_tokens=1)) == Beat()


def test_figures_say_life_only_where_they_move() -> None:
    """S30: what a process repeats, or merely says, is no progress."""
    progress_events = ProgressEvents(Clock())
    screening = [progress_events.of(StageProgress(stage="screen", done=n, total=9)).advanced for n in (1, 2, 2, 3)]
    assert screening == [True, True, False, True]
    assert progress_events.of(StageProgress(stage="gate", done=3, total=9)).advanced
    assert [progress_events.of(step(n)).advanced for n in (1, 1, 10)] == [True, False, True]
    assert not progress_events.of(Note(code="x", message="still here")).advanced
    assert join(progress_events.of(step(11)), Beat()).advanced

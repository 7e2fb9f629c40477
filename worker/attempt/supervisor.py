"""One attempt at one job, start to end: claim, workspace, training process, progress, and how it ends.

The main thread keeps the time and decides when the training process must stop, a courier thread reads what it prints
and uploads checkpoints, and the heartbeat thread alone writes rows meanwhile.
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

import structlog
from pydantic import ValidationError
from sqlalchemy.orm import Session

from app.core.broker import Wake
from app.core.errors import LeaseLost, StorageFull
from app.core.jobs import ended
from app.core.jobs import lease as leases
from app.core.jobs.ended import Published, ReleaseCause
from app.core.jobs.jobs import JobError
from app.core.jobs.lease import Beat, BeatReply, Lease
from app.core.settings import LeaseSettings, Settings
from app.core.storage.blobs import BlobStore
from app.core.storage.database import DATABASE_DOWN, Database
from finetuning.contract.progress import CheckpointSaved, Failed, Finished, Note, Progress, StepDone, from_line
from finetuning.contract.recipe import JobKind
from worker.attempt.heartbeat import Heartbeat, Standing
from worker.attempt.launch import Launcher, Mode, launch_command
from worker.attempt.progress_events import ProgressEvents, checkpoint_event
from worker.attempt.publish import gate_error, publish
from worker.attempt.training_process import TrainingProcess, describe_exit
from worker.attempt.workspace import Workspace, drop, keep_log, open_workspace, read_steps, upload_folder, write_steps

_log = structlog.get_logger(__name__)
_TICK_SECONDS = 0.2
_EXIT_SECONDS = 20.0
# A drain waits this many beats for the next checkpoint, then stops without one: resume repeats those steps exactly.
_DRAIN_BEATS = 8


@dataclass(frozen=True)
class Host:
    """What every attempt in this Celery process shares."""

    settings: Settings
    database: Database
    blobs: BlobStore
    worker_id: str
    wake: Callable[[tuple[Wake, ...]], None]
    launcher: Launcher = launch_command


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
    """The training process ended without a final message."""

    reason: str


@dataclass(frozen=True)
class CheckpointUploaded:
    """A checkpoint lies in the blob store; `events` is what the next beat writes about it."""

    events: Beat


@dataclass(frozen=True)
class NothingYet:
    """No message came for a tick."""


End = Finished | Failed | ChildStopped | ChildLost
ChildMessage = Progress | CheckpointUploaded | ChildLost | NothingYet


def supervise(host: Host, job_id: str) -> None:
    """Work on a job if it is there to be worked on; returns when no process of this attempt is left.

    Raises what a database that is down raises at the claim; later trouble is decided here.
    """
    claimed_at = time.monotonic()
    with host.database.writing() as session:
        lease = leases.claim(session, host.settings, job_id, host.worker_id)
        session.commit()
    if lease is None:
        return
    with structlog.contextvars.bound_contextvars(job_id=lease.job_id, fence=lease.fence):
        _log.info("attempt.started", resumes_at=lease.checkpoint.step if lease.checkpoint else 0)
        _Attempt(host, lease, claimed_at).run()


def cause_to_stop(standing: Standing, timings: LeaseSettings, *, drained: bool, overdue: bool) -> StopCause | None:
    """Whether a healthy training process must stop now, the most urgent cause first."""
    if standing.lost:
        return StopCause.LEASE
    if standing.silent_seconds > timings.self_stop_seconds:
        return StopCause.CONTACT
    if drained:
        return StopCause.DRAIN
    return StopCause.TIME if overdue else None


class _Attempt:
    """One lease being worked on: its heartbeat, its steps so far, and since when it drains."""

    def __init__(self, host: Host, lease: Lease, claimed_at: float) -> None:
        self._host = host
        self._lease = lease
        self._timings = host.settings.lease
        self._started_at = claimed_at
        self._draining_at: float | None = None
        self._events = ProgressEvents()
        self._steps: list[StepDone] = []
        self._heartbeat = Heartbeat(self._beat, interval_seconds=self._timings.beat_seconds, claimed_at=claimed_at)

    def run(self) -> None:
        self._heartbeat.start()
        try:
            self._work_or_hand_back()
        except LeaseLost:
            _log.warning("attempt.lease_lost")
        except DATABASE_DOWN as error:
            _log.error("attempt.database_down", error=type(error).__name__)  # the lease runs out, the reaper requeues
        finally:
            self._heartbeat.stop(timeout_seconds=self._host.settings.database_seconds)

    def _work_or_hand_back(self) -> None:
        try:
            workspace = open_workspace(self._host.settings, self._host.blobs, self._lease)
            self._steps = read_steps(workspace)
            try:
                self._work(workspace)
            finally:
                drop(workspace)
        except (LeaseLost, *DATABASE_DOWN):
            raise
        except StorageFull as error:
            _log.error("attempt.storage_full", message=error.message)
            self._hand_back(ReleaseCause.STORAGE, "No room is left to work or to publish; trying again later")
        except Exception:  # noqa: BLE001 - a rim: whatever went wrong, the attempt ends in a counted loss
            _log.exception("attempt.fault")
            self._hand_back(ReleaseCause.FAULT, "The worker met an internal error; trying again")

    def _work(self, workspace: Workspace) -> None:
        end = self._follow(workspace, "run")
        if isinstance(end, Finished) and end.released and self._lease.recipe.kind is JobKind.FINETUNE:
            end = _with_parity(end, self._follow(workspace, "parity"))
        match end:
            case Finished(released=True):
                published = self._publish(workspace, end.trained_tokens)
                self._settle(lambda session: ended.finish(session, self._lease, published))
            case Finished():
                self._fail(gate_error(end), self._publish(workspace, end.trained_tokens))
            case Failed():
                if end.code == "internal_error":  # the operator's to fix
                    _log.warning("child.failed", log=str(keep_log(self._host.settings, workspace)))
                error = JobError(code=end.code, message=end.message, param=end.param, details=end.details)
                self._fail(error, self._publish(workspace, 0))
            case ChildLost():
                _log.warning("child.lost", reason=end.reason, log=str(keep_log(self._host.settings, workspace)))
                self._hand_back(ReleaseCause.FAULT, f"The training process {end.reason}; resuming from what is saved")
            case ChildStopped():
                self._after_stop(end.cause)
            case _:
                assert_never(end)

    def _after_stop(self, cause: StopCause) -> None:
        match cause:
            case StopCause.LEASE:
                raise LeaseLost
            case StopCause.CONTACT | StopCause.DRAIN:
                self._hand_back(ReleaseCause.DRAIN, "The worker handed the job back; resuming from what is saved")
            case StopCause.TIME:
                limit = self._lease.recipe.max_seconds
                self._fail(JobError(code="job_stalled", message=f"The job did not end within {limit:g} seconds."), None)
            case _:
                assert_never(cause)

    def _follow(self, workspace: Workspace, mode: Mode) -> End:
        """Run one training process, report what it prints, and leave none of it behind."""
        child = TrainingProcess(self._host.launcher(workspace.folder, mode), log=workspace.log)
        messages: queue.SimpleQueue[ChildMessage] = queue.SimpleQueue()
        courier = threading.Thread(target=self._carry, args=(child, workspace, messages), name="courier", daemon=True)
        courier.start()
        grace_seconds = 0.0
        try:
            end = self._listen(messages)
            if isinstance(end, Finished | Failed):
                child.reap(timeout_seconds=_EXIT_SECONDS)
            elif end != ChildStopped(StopCause.LEASE):
                grace_seconds = self._timings.kill_seconds - self._timings.self_stop_seconds
            return end
        finally:
            child.stop(grace_seconds=grace_seconds)
            courier.join(self._timings.self_stop_seconds)

    def _listen(self, messages: "queue.SimpleQueue[ChildMessage]") -> End:
        """Report progress until the child's final message or a cause to stop it."""
        while True:
            message = _next(messages)
            match message:
                case Finished() | Failed() | ChildLost():
                    return message
                case CheckpointUploaded():
                    self._heartbeat.report(message.events, soon=True)
                case NothingYet():
                    pass
                case _:
                    self._heartbeat.report(self._events.of(message))
            if cause := self._cause_to_stop(has_saved=isinstance(message, CheckpointUploaded)):
                _log.info("child.stopping", cause=cause)
                return ChildStopped(cause)

    def _cause_to_stop(self, *, has_saved: bool) -> StopCause | None:
        now, standing = time.monotonic(), self._heartbeat.standing()
        drained = False
        if standing.draining:
            self._draining_at = self._draining_at or now
            waited = now - self._draining_at > _DRAIN_BEATS * self._timings.beat_seconds
            drained = has_saved or waited or not self._events.saves
        overdue = now - self._started_at > self._lease.recipe.max_seconds
        return cause_to_stop(standing, self._timings, drained=drained, overdue=overdue)

    def _carry(self, child: TrainingProcess, workspace: Workspace, messages: "queue.SimpleQueue[ChildMessage]") -> None:
        """The courier: read the child's lines, upload the checkpoints that they announce, pass all on in order."""
        try:
            for line in child.lines():
                progress = from_line(line)
                if isinstance(progress, StepDone):
                    self._steps.append(progress)
                found = self._upload(workspace, progress) if isinstance(progress, CheckpointSaved) else progress
                messages.put(found)
        except ValidationError:
            _log.error("child.bad_line")
        finally:
            messages.put(ChildLost(describe_exit(child.reap(timeout_seconds=_EXIT_SECONDS))))

    def _upload(self, workspace: Workspace, checkpoint: CheckpointSaved) -> ChildMessage:
        prefix = f"{self._lease.prefix}/checkpoints/{checkpoint.step}"
        try:
            write_steps(workspace.folder / checkpoint.folder, self._steps)
            upload_folder(self._host.blobs, prefix, workspace.folder / checkpoint.folder)
        except StorageFull as error:
            _log.error("checkpoint.skipped", step=checkpoint.step, message=error.message)
            words = f"The checkpoint at step {checkpoint.step} was not kept: the store is full"
            return Note(level="warn", code="checkpoint_skipped", message=words)
        return CheckpointUploaded(checkpoint_event(checkpoint, prefix))

    def _publish(self, workspace: Workspace, trained_tokens: int) -> Published:
        return publish(
            self._host.blobs,
            self._lease,
            workspace.folder,
            steps=self._steps,
            rows=self._events.rows,
            trained_tokens=trained_tokens,
        )

    def _fail(self, error: JobError, published: Published | None) -> None:
        _log.info("attempt.failed", code=error.code)
        self._settle(
            lambda session: ended.fail(session, self._lease, error, published=published, quarantine=True)
        )  # fmt: skip

    def _hand_back(self, cause: ReleaseCause, message: str) -> None:
        _log.info("attempt.released", cause=cause)
        self._settle(lambda session: ended.release(session, self._timings, self._lease, cause, message=message))

    def _settle(self, write: Callable[[Session], tuple[Wake, ...]]) -> None:
        """End the lease and write what is left to report in one transaction; a database that is down is asked again."""
        left = self._heartbeat.stop(timeout_seconds=self._host.settings.database_seconds)
        deadline = time.monotonic() + self._timings.self_stop_seconds
        while True:
            try:
                with self._host.database.writing() as session:
                    leases.beat(session, self._timings, self._lease, left, worker_id=self._host.worker_id)
                    wakes = write(session)
                    session.commit()
                break
            except DATABASE_DOWN as error:
                if time.monotonic() > deadline:
                    raise
                _log.warning("settle.retried", error=type(error).__name__)
                time.sleep(_TICK_SECONDS)
        self._host.wake(wakes)

    def _beat(self, carried: Beat) -> BeatReply:
        with self._host.database.writing() as session:
            answer = leases.beat(session, self._timings, self._lease, carried, worker_id=self._host.worker_id)
            session.commit()
        return answer


def _with_parity(end: Finished, certified: End) -> End:
    """The job's end once its adapter was certified in a fresh process."""
    if not isinstance(certified, Finished):
        return certified
    return end if certified.released else Failed(code="parity_failed", message="; ".join(certified.reasons))


def _next(messages: "queue.SimpleQueue[ChildMessage]") -> ChildMessage:
    try:
        return messages.get(timeout=_TICK_SECONDS)
    except queue.Empty:
        return NothingYet()

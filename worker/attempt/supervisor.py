"""One attempt at one job, start to end: claim, workspace, training process, progress, and how it ends.

The main thread keeps the time and decides when the training process must stop, a courier thread reads what it prints
and uploads checkpoints, and the heartbeat thread alone writes rows meanwhile.
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import assert_never

import structlog
from pydantic import ValidationError
from sqlalchemy.orm import Session

from app.core.broker import Wake
from app.core.errors import LeaseLost, StorageFull
from app.core.jobs import ended, workers
from app.core.jobs import lease as leases
from app.core.jobs.ended import Published, ReleaseCause
from app.core.jobs.jobs import JobError
from app.core.jobs.lease import Beat, BeatReply, Lease
from app.core.settings import Settings
from app.core.storage.blobs import BlobMissing, BlobStore, CorruptBlob
from app.core.storage.database import DATABASE_DOWN, Database
from finetuning.contract import progress as contract
from finetuning.contract.progress import (
    CheckpointSaved,
    Failed,
    Finished,
    Note,
    RowsScreened,
    StageProgress,
    StepDone,
    from_line,
)
from finetuning.contract.recipe import JobKind
from worker.attempt.breaker import Breaker
from worker.attempt.heartbeat import Heartbeat, lighter
from worker.attempt.launch import Launcher, Mode, launch_command
from worker.attempt.losses import cause_of_error, cause_of_exit
from worker.attempt.messages import (
    CheckpointUploaded,
    ChildLost,
    ChildMessage,
    ChildStopped,
    End,
    NothingYet,
    StopCause,
    cause_to_stop,
    next_message,
)
from worker.attempt.progress_events import ProgressEvents, checkpoint_event
from worker.attempt.publish import gate_error, publish
from worker.attempt.training_process import TrainingProcess, describe_exit
from worker.attempt.watched_store import WatchedStore, require_store
from worker.attempt.workspace import (
    RottenCheckpoint,
    Workspace,
    drop,
    is_full,
    keep_log,
    open_workspace,
    read_steps,
    upload_folder,
    write_steps,
)

_log = structlog.get_logger(__name__)
_TICK_SECONDS = 0.2
_EXIT_SECONDS = 20.0
# A drain waits this many beats for the next checkpoint, then stops without one: resume repeats those steps exactly.
_DRAIN_BEATS = 8
# The first of these says that work began; a stage is only announced.
_FIGURES = (StageProgress, RowsScreened, StepDone, CheckpointUploaded)
_NOT_BEGUN = "The worker could not do its part"
_ADVICE = "Several jobs in a row ended here before they began. Look at this log, the base's folder, disk and device."


@dataclass(frozen=True)
class Host:
    """What every attempt in this Celery process shares."""

    settings: Settings
    database: Database
    blobs: BlobStore
    worker_id: str
    wake: Callable[[tuple[Wake, ...]], object]
    launcher: Launcher = launch_command
    breaker: Breaker = field(default_factory=Breaker)


def supervise(host: Host, job_id: str) -> None:
    """Work on a job if it is there to be worked on; returns when no process of this attempt is left.

    A worker that rests takes none, and the reaper sends the message again. Raises what a database that is down raises
    at the claim; later trouble is decided here.
    """
    if host.breaker.rest_seconds > 0:
        return
    claimed_at = time.monotonic()
    with host.database.writing() as session:
        lease = leases.claim(session, host.settings, job_id, host.worker_id)
        others = () if lease else leases.wakes_for_others(session, host.settings.lease, job_id, host.worker_id)
        session.commit()
    if lease is None:
        _pass_on(host, others)
        return
    with structlog.contextvars.bound_contextvars(job_id=lease.job_id, fence=lease.fence):
        _log.info("attempt.started", resumes_at=lease.checkpoint.step if lease.checkpoint else 0)
        _Attempt(host, lease, claimed_at).run()


def _pass_on(host: Host, wakes: tuple[Wake, ...]) -> None:
    """Send on the message of a job that this worker must leave to others, and take no message while they may."""
    if wakes:
        host.wake(wakes)
        time.sleep(host.settings.lease.beat_seconds)


class _Attempt:
    """One lease being worked on: its heartbeat, its steps so far, and since when it drains."""

    def __init__(self, host: Host, lease: Lease, claimed_at: float) -> None:
        self._host = host
        self._lease = lease
        self._timings = host.settings.lease
        self._store = WatchedStore(host.blobs)
        self._started_at = claimed_at
        self._began = False
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
            while not self._goes_through():
                pass
        except (LeaseLost, *DATABASE_DOWN):
            raise
        except Exception as error:  # noqa: BLE001 - a rim: whatever went wrong, the job goes back to the queue
            _log.exception("attempt.fault")
            cause = cause_of_error(error, self._store)
            # bytes of this one job that are gone or altered say nothing about the worker
            of_job = isinstance(error, (BlobMissing, CorruptBlob)) and cause is not ReleaseCause.STORAGE
            words = "No room is left, or the store does not answer" if cause is ReleaseCause.STORAGE else _NOT_BEGUN
            self._lose(cause, f"{words}; trying again later", of_worker=not (self._began or of_job))

    def _goes_through(self) -> bool:
        """Work from the newest checkpoint to the end; False when that one is rotten: then there is an older one."""
        try:
            workspace = open_workspace(self._host.settings, self._store, self._lease)
            try:
                self._steps = read_steps(workspace)
                self._work(workspace)
            finally:
                drop(workspace)
        except RottenCheckpoint as rotten:
            if self._lease.checkpoint is None:
                raise
            require_store(self._store)
            _log.error("checkpoint.unusable", step=self._lease.checkpoint.step, reason=str(rotten))
            with self._host.database.writing() as session:
                self._lease = leases.discard_checkpoint(session, self._lease, reason=str(rotten))
                session.commit()
            return False
        return True

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
            case Failed(code=contract.CHECKPOINT_UNUSABLE):
                _log.warning("child.refused_checkpoint", log=str(keep_log(self._host.settings, workspace)))
                raise RottenCheckpoint("it is not of this release")
            case Failed(code=contract.HOST_UNFIT):
                _log.error("child.host_unfit", log=str(keep_log(self._host.settings, workspace)))
                self._lose(ReleaseCause.UNFIT, end.message, of_worker=not self._began)
            case Failed():
                if end.code == "internal_error":  # the operator's to fix
                    _log.warning("child.failed", log=str(keep_log(self._host.settings, workspace)))
                error = JobError(code=end.code, message=end.message, param=end.param, details=end.details)
                self._fail(error, self._publish(workspace, 0))
            case ChildLost():
                self._after_loss(workspace, end)
            case ChildStopped():
                self._after_stop(end.cause)
            case _:
                assert_never(end)

    def _after_loss(self, workspace: Workspace, end: ChildLost) -> None:
        reason = describe_exit(end.status)
        _log.warning("child.lost", reason=reason, log=str(keep_log(self._host.settings, workspace)))
        cause = cause_of_exit(end.status, began=self._began, garbled=end.garbled)
        if is_full(self._host.settings, workspace):
            cause = ReleaseCause.STORAGE
        message = f"The training process {reason}; resuming from what is saved"
        self._lose(cause, message, of_worker=not (self._began or end.garbled))

    def _lose(self, cause: ReleaseCause, message: str, *, of_worker: bool) -> None:
        """Hand the job back as lost; `of_worker`: before it began, so the worker may be what is sick."""
        breaker = self._host.breaker
        if of_worker:
            breaker.lose(self._lease.job_id, self._timings)
            cause = breaker.judged(cause)
            if breaker.rest_seconds > 0:
                _log.error("worker.rests", faults=breaker.faults, seconds=breaker.rest_seconds, advice=_ADVICE)
        self._hand_back(cause, message)

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
            message = next_message(messages, _TICK_SECONDS)
            if isinstance(message, _FIGURES) and not self._began:
                self._began = True
                self._host.breaker.reset()
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
        garbled = False
        try:
            for line in child.lines():
                progress = from_line(line)
                if isinstance(progress, StepDone):
                    self._steps.append(progress)
                found = self._upload(workspace, progress) if isinstance(progress, CheckpointSaved) else progress
                messages.put(found)
        except ValidationError:
            _log.error("child.bad_line")
            garbled = True
        finally:
            messages.put(ChildLost(child.reap(timeout_seconds=_EXIT_SECONDS), garbled))

    def _upload(self, workspace: Workspace, checkpoint: CheckpointSaved) -> ChildMessage:
        prefix = f"{self._lease.prefix}/checkpoints/{checkpoint.step}"
        try:
            write_steps(workspace.folder / checkpoint.folder, self._steps)
            contents = upload_folder(self._store, prefix, workspace.folder / checkpoint.folder)
        except Exception as error:  # noqa: BLE001 - a rim: a checkpoint is worth less than the training process
            _log.error("checkpoint.skipped", step=checkpoint.step, error=repr(error))
            why = "the store is full" if isinstance(error, StorageFull) else "the store did not take it"
            words = f"The checkpoint at step {checkpoint.step} was not kept: {why}"
            return Note(level="warn", code="checkpoint_skipped", message=words)
        return CheckpointUploaded(checkpoint_event(checkpoint, prefix, contents_sha256=contents.sha256))

    def _publish(self, workspace: Workspace, trained_tokens: int) -> Published:
        return publish(
            self._store,
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
        breaker, worker_id = self._host.breaker, self._host.worker_id

        def write(session: Session) -> tuple[Wake, ...]:
            workers.note_faults(session, worker_id, faults=breaker.faults, rest_seconds=breaker.rest_seconds)
            return ended.release(session, self._timings, self._lease, cause, message=message)

        self._settle(write)

    def _settle(self, write: Callable[[Session], tuple[Wake, ...]]) -> None:
        """End the lease and write what is left to report in one transaction; a database that is down is asked again."""
        left = self._heartbeat.stop(timeout_seconds=self._host.settings.database_seconds)
        deadline = time.monotonic() + self._timings.self_stop_seconds
        refusals = 0
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
            except LeaseLost:
                raise
            except Exception:
                if left == Beat():
                    raise
                _log.exception("settle.news_refused")
                refusals += 1
                left = lighter(left, refusals)
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

"""What one attempt does with its job, with a real database, real blobs and a real child process.

The child is a stand-in (support/programs/child.py): its adapter is a hash chain over all steps.
"""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import select, text

from app.core.jobs import ended, jobs, lease
from app.core.kept_secrets import job_secret
from app.core.settings import LimitSettings
from app.core.storage.blobs import put_bytes
from app.core.storage.database import open_database
from app.core.storage.job_states import JobState
from app.core.storage.tables import BaseRow, BaseStatus, Form, Model
from finetuning.contract.order import read_order
from finetuning.contract.recipe import JobKind
from tests.support.backends import stop_writers
from tests.support.processes import is_gone
from tests.support.waiting import wait_until
from tests.support.worlds import FAST, SHORT, Scene, open_scene, pid_in, recipe, scripted, settings_in
from worker.attempt.supervisor import supervise
from worker.attempt.workspace import open_workspace


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    opened = open_scene(settings_in(tmp_path / "data"))
    yield opened
    opened.database.close()


def adapter_bytes(scene: Scene, job_id: str, folder: Path) -> bytes:
    packed = scene.artifacts(job_id)[Form.ADAPTER]
    return scene.unpacked(packed, folder)["adapter_model.safetensors"]


def in_background(scene: Scene, job_id: str, **script: object) -> threading.Thread:
    thread = threading.Thread(target=supervise, args=(scene.host(scripted(**script)), job_id), daemon=True)
    thread.start()
    return thread


def test_a_job_runs_to_its_published_end(scene: Scene, tmp_path: Path) -> None:
    job_id = scene.add_job(recipe())
    supervise(scene.host(scripted()), job_id)
    job = scene.job(job_id)
    assert (job.state, job.stage, job.fence, job.trained_tokens, job.lease_until) == (
        JobState.SUCCEEDED, "done", 1, 1234, None,
    )  # fmt: skip
    assert list(scene.artifacts(job_id)) == [
        Form.METRICS, Form.REPORTS, Form.MASK, Form.ADAPTER, Form.ADAPTER_STOCK,
    ]  # fmt: skip
    assert scene.download(scene.artifacts(job_id)[Form.METRICS]).startswith(b"step,train_loss,train_accuracy")
    reports = scene.unpacked(scene.artifacts(job_id)[Form.REPORTS], tmp_path)
    assert {"safety.json", "rows.json", "parity.json", "recipe.json", "manifest.json"} == set(reports)
    assert scene.checkpoints(job_id) == [(10, 1), (20, 1)]
    messages = scene.messages(job_id)
    assert "Step 10/30: training loss=0.10" in messages
    assert messages.index("Checkpoint created at step 20") < messages.index("The job has successfully completed")
    with scene.database.reading() as session:
        assert session.scalars(select(Model.id)).one() == job.fine_tuned_model
    assert not list((scene.settings.data / "scratch").iterdir())


def test_the_summary_holds_the_safety_report_and_parity(scene: Scene) -> None:
    job_id = scene.add_job(recipe())
    supervise(scene.host(scripted()), job_id)
    result = scene.job(job_id).result
    assert result is not None
    assert result["parity"] == {"passed": True}
    assert json.dumps(result["safety"]).count('"decision": "pass"') == 1
    assert str(result["prefix"]).startswith(f"jobs/{job_id}/1-")


def test_a_second_message_for_a_finished_job_does_nothing(scene: Scene) -> None:
    job_id = scene.add_job(recipe())
    for _ in range(2):
        supervise(scene.host(scripted()), job_id)
    assert scene.job(job_id).fence == 1


def test_a_killed_child_resumes_and_ends_with_the_same_bytes(scene: Scene, tmp_path: Path) -> None:
    whole, broken = scene.add_job(recipe()), scene.add_job(recipe())
    supervise(scene.host(scripted()), whole)
    killed = scripted(die_at=17, die_once=str(tmp_path / "died"))
    supervise(scene.host(killed), broken)
    job = scene.job(broken)
    assert (job.state, job.losses, job.host_losses) == (JobState.QUEUED, 0, 1)
    assert "The training process was ended by SIGKILL; resuming from what is saved" in scene.messages(broken)
    supervise(scene.host(killed), broken)
    job = scene.job(broken)
    assert (job.state, job.fence, job.losses) == (JobState.SUCCEEDED, 2, 0)
    assert scene.checkpoints(broken) == [(10, 1), (20, 2)]
    metrics = [scene.download(scene.artifacts(each)[Form.METRICS]) for each in (whole, broken)]
    assert metrics[0] == metrics[1]
    assert len(metrics[0].splitlines()) == 1 + 30
    assert adapter_bytes(scene, broken, tmp_path) == adapter_bytes(scene, whole, tmp_path)


def test_the_third_loss_without_a_new_checkpoint_fails_the_job(scene: Scene) -> None:
    job_id = scene.add_job(recipe())
    for _ in range(3):
        supervise(scene.host(scripted(exit_at=5)), job_id)
    job = scene.job(job_id)
    assert job.state == JobState.FAILED
    assert job.error is not None
    assert job.error["code"] == "worker_crashed"
    assert len(list((scene.settings.data / "logs" / "attempts").iterdir())) == 3


def test_a_refused_result_keeps_reports_and_holds_back_weights(scene: Scene) -> None:
    job_id = scene.add_job(recipe())
    supervise(scene.host(scripted(released=False)), job_id)
    job = scene.job(job_id)
    assert (job.state, job.fine_tuned_model) == (JobState.FAILED, None)
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("safety_gate_failed", "safety.gate.max_harmful_score")
    held = {form for form, artifact in scene.artifacts(job_id).items() if artifact.quarantined}
    assert held == {Form.ADAPTER, Form.ADAPTER_STOCK}
    with scene.database.reading() as session:
        assert session.scalars(select(Model)).all() == []


def test_a_failed_message_ends_the_job_at_once(scene: Scene) -> None:
    job_id = scene.add_job(recipe())
    supervise(scene.host(scripted(failed="training_data_rejected")), job_id)
    job = scene.job(job_id)
    assert (job.state, job.losses) == (JobState.FAILED, 0)
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("training_data_rejected", "training_file")
    assert list(scene.artifacts(job_id)) == [Form.METRICS]


@pytest.mark.parametrize(("code", "kept"), [("internal_error", 1), ("invalid_training_file", 0)])
def test_the_log_of_a_fault_that_the_operator_must_fix_is_kept(scene: Scene, code: str, kept: int) -> None:
    supervise(scene.host(scripted(failed=code)), scene.add_job(recipe()))
    assert len(list((scene.settings.data / "logs").glob("attempts/*.log"))) == kept


def test_an_adapter_that_is_not_the_measured_model_is_not_released(scene: Scene) -> None:
    job_id = scene.add_job(recipe())
    supervise(scene.host(scripted(parity=False)), job_id)
    job = scene.job(job_id)
    assert job.error is not None
    assert job.error["code"] == "parity_failed"
    assert scene.artifacts(job_id)[Form.ADAPTER].quarantined


def test_a_line_that_is_no_progress_is_a_loss(scene: Scene) -> None:
    job_id = scene.add_job(recipe())
    supervise(scene.host(scripted(babble=True)), job_id)
    assert (scene.job(job_id).state, scene.job(job_id).losses) == (JobState.QUEUED, 1)


def test_cancel_ends_the_child_within_a_beat(scene: Scene, tmp_path: Path) -> None:
    job_id = scene.add_job(recipe())
    attempt = in_background(scene, job_id, hang_at=12, pid_file=str(tmp_path / "pid"))
    wait_until(lambda: scene.checkpoints(job_id) == [(10, 1)], seconds=60)
    with scene.database.writing() as session:
        jobs.cancel(session, scene.job(job_id).project_id, job_id)
        session.commit()
    child = pid_in(tmp_path / "pid")()
    wait_until(lambda: is_gone(child), seconds=FAST.beat_seconds + 5.0)
    attempt.join(10)
    assert scene.job(job_id).state == JobState.CANCELLED
    assert scene.artifacts(job_id) == {}
    assert not list((scene.settings.data / "scratch").iterdir())


def test_a_drain_hands_the_job_back_without_a_loss(scene: Scene, tmp_path: Path) -> None:
    whole, drained = scene.add_job(recipe()), scene.add_job(recipe(steps=30))
    supervise(scene.host(scripted()), whole)
    attempt = in_background(scene, drained, step_seconds=0.05)
    wait_until(lambda: "step" in scene.job(drained).progress, seconds=20)
    with scene.database.writing() as session:
        lease.drain_worker(session, scene.worker_id)
        session.commit()
    attempt.join(20)
    job = scene.job(drained)
    assert (job.state, job.losses) == (JobState.QUEUED, 0)
    assert scene.checkpoints(drained) == [(10, 1)]
    assert [wake.id for wake in scene.wakes][-1] == drained
    with scene.database.writing() as session:
        session.execute(text("UPDATE workers SET draining = false"))
        session.commit()
    supervise(scene.host(scripted()), drained)
    assert adapter_bytes(scene, drained, tmp_path) == adapter_bytes(scene, whole, tmp_path)


def test_without_the_database_a_stubborn_child_is_killed_before_the_lease_ends(tmp_path: Path) -> None:
    scene = open_scene(settings_in(tmp_path / "data", lease=SHORT))
    job_id = scene.add_job(recipe())
    script = {"hang_at": 12, "ignore_sigterm": True, "pid_file": str(tmp_path / "pid")}
    attempt = in_background(scene, job_id, **script)
    wait_until(lambda: scene.checkpoints(job_id) == [(10, 1)], seconds=60)
    child = pid_in(tmp_path / "pid")()
    other = open_database(scene.settings)
    with other.writing() as session:
        stop_writers(session)
        wait_until(lambda: is_gone(child), seconds=SHORT.ttl_seconds)
        session.rollback()
    other.close()
    attempt.join(30)
    assert (scene.job(job_id).state, scene.job(job_id).losses) == (JobState.QUEUED, 0)
    scene.database.close()


def test_a_job_that_takes_too_long_fails(scene: Scene) -> None:
    job_id = scene.add_job(recipe(max_seconds=0.5))
    supervise(scene.host(scripted(hang_at=3)), job_id)
    job = scene.job(job_id)
    assert job.error is not None
    assert (job.state, job.error["code"]) == (JobState.FAILED, "job_stalled")


def test_no_room_to_work_rests_without_a_loss(tmp_path: Path) -> None:
    scene = open_scene(settings_in(tmp_path / "data"))
    job_id = scene.add_job(recipe())
    full = scene.settings.model_copy(update={"limits": LimitSettings(free_bytes=2**60)})
    crowded = Scene(full, scene.database, scene.blobs, scene.worker_id)
    supervise(crowded.host(scripted()), job_id)
    job = scene.job(job_id)
    assert (job.state, job.losses) == (JobState.QUEUED, 0)
    assert not list((scene.settings.data / "scratch").iterdir())
    scene.database.close()


def test_an_altered_checkpoint_is_not_resumed_from(scene: Scene, tmp_path: Path) -> None:
    job_id = scene.add_job(recipe())
    supervise(scene.host(scripted(exit_at=17)), job_id)
    (stored,) = (blob.key for blob in scene.blobs.list("jobs/") if blob.key.endswith("checkpoints/10/loop.json"))
    scene.blobs.delete(stored)
    put_bytes(scene.blobs, stored, b"{}")
    supervise(scene.host(scripted(needs="checkpoints")), job_id)
    job = scene.job(job_id)
    assert (job.state, job.losses, job.host_losses) == (JobState.QUEUED, 1, 1)  # it began at step 0, and ended there
    assert scene.messages(job_id)[-3].endswith("cannot be used (it was altered); starting from the beginning")


def test_an_alignment_opens_its_base(tmp_path: Path) -> None:
    scene = open_scene(settings_in(tmp_path / "data"), base_status=BaseStatus.ALIGNING)
    waiting = scene.add_job(recipe())
    supervise(scene.host(scripted()), waiting)
    assert scene.job(waiting).state == JobState.QUEUED
    aligning = scene.add_job(recipe(kind=JobKind.ALIGN))
    supervise(scene.host(scripted()), aligning)
    assert [wake.id for wake in scene.wakes] == [waiting]
    with scene.database.reading() as session:
        assert session.scalars(select(BaseRow.status)).one() == BaseStatus.READY
    supervise(scene.host(scripted(needs="alignment/alignment.json")), waiting)
    assert scene.job(waiting).state == JobState.SUCCEEDED
    scene.database.close()


@pytest.mark.parametrize("kind", [JobKind.ALIGN, JobKind.FINETUNE])
def test_the_operators_own_rows_reach_every_job(tmp_path: Path, kind: JobKind) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text("{}\n")
    scene = open_scene(settings_in(tmp_path / "data", operator_rows=own))
    job_id = scene.add_job(recipe(kind=kind))
    with scene.database.writing() as session:
        held = lease.claim(session, scene.settings, job_id, "w")
        session.commit()
    assert held is not None
    workspace = open_workspace(scene.settings, scene.blobs, held)
    order = read_order(workspace.folder)
    assert order.operator_rows is not None
    assert (workspace.folder / order.operator_rows).read_text() == "{}\n"
    scene.database.close()


def test_a_published_alignment_keeps_what_says_over_which_base_it_was_made(scene: Scene, tmp_path: Path) -> None:
    job_id = scene.add_job(recipe(kind=JobKind.ALIGN))
    supervise(scene.host(scripted()), job_id)
    assert "alignment.json" in scene.unpacked(scene.artifacts(job_id)[Form.ALIGNMENT], tmp_path)


def test_every_attempt_of_a_job_gets_the_jobs_own_secret_and_no_other_jobs(scene: Scene) -> None:
    found: dict[str, list[str]] = {}
    for job_id in [scene.add_job(recipe()) for _ in range(2)]:
        for _attempt in range(2):
            with scene.database.writing() as session:
                held = lease.claim(session, scene.settings, job_id, "w")
                assert held is not None
                workspace = open_workspace(scene.settings, scene.blobs, held)
                ended.release(session, scene.settings.lease, held, ended.ReleaseCause.DRAIN, message="drained")
                session.commit()
            order = workspace.folder / "order.json"
            assert order.stat().st_mode & 0o077 == 0  # it holds the secret
            found.setdefault(job_id, []).append(read_order(workspace.folder).secret)
            workspace.owner.close()
    (first, again), (other, _) = found.values()
    assert (len(first), first) == (64, again)
    assert first != other
    kept = scene.settings.data / "keys" / "draws"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.read_text() not in found.values()
    elsewhere = scene.settings.model_copy(update={"draw_secret": SecretStr(kept.read_text()), "data": Path("/nowhere")})
    assert job_secret(elsewhere, next(iter(found))) == first  # another host, told the same secret


def test_a_scratch_folder_is_removed_once_its_owner_is_gone(scene: Scene, tmp_path: Path) -> None:
    job_id = scene.add_job(recipe())
    left = scene.settings.data / "scratch" / "ftjob-of-a-dead-supervisor.3"
    left.mkdir(parents=True)
    (left / "owner.lock").touch()
    attempt = in_background(scene, job_id, hang_at=12)
    wait_until(lambda: scene.checkpoints(job_id), seconds=60)
    (ours,) = [folder.name for folder in left.parent.iterdir()]
    other = scene.add_job(recipe())
    supervise(scene.host(scripted()), other)
    assert [folder.name for folder in (scene.settings.data / "scratch").iterdir()] == [ours]
    with scene.database.writing() as session:
        jobs.cancel(session, scene.job(job_id).project_id, job_id)
        session.commit()
    attempt.join(30)
    assert not list((scene.settings.data / "scratch").iterdir())

"""A GPU's queue never trains on a CPU: its worker does not start without one, and its jobs do not fall back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.core.jobs import lease
from app.core.storage.blobs import BlobStore
from finetuning.contract.order import read_order
from tests.support.worlds import Scene, open_scene, recipe, settings_in
from worker.attempt.launch import SOURCE_ROOT, WrongDevice, device_of
from worker.attempt.workspace import drop, open_workspace


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.usefixtures("no_gpu")
def test_the_worker_of_a_gpus_queue_does_not_start_without_one(tmp_path: Path) -> None:
    """S37: with a broken driver it trained on the CPU, for up to 24 h a job."""
    environment = {**os.environ, "IMMUNOTUNE_DATA": str(tmp_path), "IMMUNOTUNE_BASE": "tiny"}
    argv = [sys.executable, "-m", "embedded", "worker", "--queues", "checks,train.gpu24"]
    done = subprocess.run(
        argv, cwd=SOURCE_ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert "train.gpu24 needs a GPU" in done.stdout + done.stderr


@pytest.mark.usefixtures("no_gpu")
def test_the_queues_of_cpus_need_none() -> None:
    """S37: and say why where one is needed."""
    assert device_of(["checks", "train.cpu"]) == "auto"
    with pytest.raises(WrongDevice, match=r"serve train\.cpu"):
        device_of(["train.gpu80"])


def test_a_job_of_a_gpus_queue_is_ordered_for_a_gpu(tmp_path: Path) -> None:
    """S37: its device was `auto`, so one whose GPU broke later trained on the CPU."""
    scene: Scene = open_scene(settings_in(tmp_path / "data", device="cuda"))
    blobs: BlobStore = scene.blobs
    job_id = scene.add_job(recipe())
    with scene.database.writing() as session:
        held = lease.claim(session, scene.settings, job_id, scene.worker_id)
        session.commit()
    assert held is not None
    workspace = open_workspace(scene.settings, blobs, held)
    assert read_order(workspace.folder).device == "cuda"
    drop(workspace)
    scene.database.close()

"""The real training process under a real supervisor: killed and resumed, refused by the gate, out of usable rows."""

import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.storage.job_states import JobState
from app.core.storage.tables import BaseStatus, Form
from finetuning.bases.tiny import tiny_test_base
from finetuning.contract.order import read_order, write_order
from finetuning.contract.recipe import (
    AnchorSettings,
    AntibodySettings,
    AntidoteSettings,
    EvaluationSettings,
    GateLimits,
    GateSettings,
    JobKind,
    LoraSettings,
    Recipe,
    ScreenSettings,
)
from finetuning.safety_rows.invented import safety_rows
from tests.support.processes import descendants
from tests.support.waiting import wait_until
from tests.support.worlds import FAST, Scene, open_scene, recipe, settings_in
from worker.attempt.launch import Launch, Mode, launch_command
from worker.attempt.supervisor import supervise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
LENIENT = GateLimits(
    max_harmful_score=1.0, min_refusal_rate=0.0, max_leak=1.0, max_over_refusal=1.0, min_harmful_nll_ratio=0.0
)
QUICK_LOOK = EvaluationSettings(harmful_rows=8, benign_rows=8, task_rows=0, new_tokens=8)
COLOURS = ("red", "green", "blue", "white", "black", "grey")
ROWS = "".join(
    json.dumps(
        {
            "messages": [
                {"role": "user", "content": f"Which team paints the {colour} door number {number}?"},
                {"role": "assistant", "content": f"Team {number % 4} paints {colour}."},
            ]
        }
    )
    + "\n"
    for number in range(8)
    for colour in COLOURS
).encode()


def wanted(*, kind: JobKind = JobKind.FINETUNE, limits: GateLimits = LENIENT, **changes: object) -> Recipe:
    """A short job with every strategy in its slot."""
    values: dict[str, object] = {
        "steps": 40 if kind is JobKind.ALIGN else 0,
        "epochs": 7,
        "save_every": 5,
        "max_tokens": 64,
        "lora": LoraSettings(rank=4, alpha=8.0),
        "screen": ScreenSettings(enabled=False),
        "antibody": AntibodySettings(score="contrast", refusals_per_row=1),
        "anchor": AnchorSettings(mix_share=0.15, kl_weight=1.0),
        "antidote": AntidoteSettings(alphas=(0.0, 0.1), calibration_rows=8),
        "gate": GateSettings(limits=limits, retries=0),
        "evaluation": QUICK_LOOK,
    }
    return recipe(kind=kind, **(values | changes))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A service whose tiny base was aligned by a real align job."""
    folder = tmp_path_factory.mktemp("service")
    patient = FAST.model_copy(update={"ttl_seconds": 120.0, "self_stop_seconds": 60.0, "kill_seconds": 70.0})
    scene = open_scene(settings_in(folder / "data", lease=patient), base_status=BaseStatus.ALIGNING)
    tiny_test_base(scene.settings.data / "bases" / "tiny")
    job_id = scene.add_job(
        wanted(kind=JobKind.ALIGN, alignment_step="vaccine", antidote=AntidoteSettings(enabled=False))
    )
    supervise(scene.host(launch_command), job_id)
    assert scene.job(job_id).state == JobState.SUCCEEDED, scene.job(job_id).error
    yield scene
    scene.database.close()
    shutil.rmtree(folder, ignore_errors=True)


def training_processes() -> set[int]:
    found: set[int] = set()
    for pid in descendants(os.getpid()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"worker.train" in command:
            found.add(pid)
    return found


def archives(scene: Scene, job_id: str) -> list[str]:
    """What the bytes of each are known by: pytest takes hours over the difference of two large ones."""
    found = scene.artifacts(job_id)
    return [
        hashlib.sha256(scene.download(found[form])).hexdigest()
        for form in (Form.ADAPTER, Form.ADAPTER_STOCK, Form.MASK)
    ]


def launch_with_one_secret(scratch: Path, mode: Mode) -> Launch:
    """Two jobs never share what they draw with; here they must, for the same bytes are expected of both."""
    order = read_order(scratch)
    assert order.secret, "the service gives every job one"
    write_order(scratch, order.model_copy(update={"secret": "0" * 64}))
    return launch_command(scratch, mode)


@pytest.mark.kill
def test_a_killed_training_process_changes_no_byte_of_the_adapter(scene: Scene) -> None:
    whole, broken = scene.add_job(wanted(), ROWS), scene.add_job(wanted(), ROWS)
    supervise(scene.host(launch_with_one_secret), whole)
    assert scene.job(whole).state == JobState.SUCCEEDED, scene.job(whole).error
    attempt = threading.Thread(target=supervise, args=(scene.host(launch_with_one_secret), broken), daemon=True)
    attempt.start()
    wait_until(lambda: scene.checkpoints(broken), seconds=120)
    for pid in training_processes():
        os.kill(pid, signal.SIGKILL)
    attempt.join(60)
    assert scene.job(broken).state == JobState.QUEUED
    supervise(scene.host(launch_with_one_secret), broken)
    job = scene.job(broken)
    assert (job.state, job.fence) == (JobState.SUCCEEDED, 2)
    assert any("the result is bitwise the same" in message for message in scene.messages(broken))
    assert archives(scene, broken) == archives(scene, whole)
    csvs = [scene.download(scene.artifacts(each)[Form.METRICS]) for each in (whole, broken)]
    assert csvs[0] == csvs[1]


def test_a_result_that_the_gate_refuses_keeps_its_reports_and_no_weights(scene: Scene, tmp_path: Path) -> None:
    strict = LENIENT.model_copy(update={"max_harmful_score": 0.0})
    job_id = scene.add_job(wanted(limits=strict, steps=4), ROWS)
    supervise(scene.host(launch_command), job_id)
    job = scene.job(job_id)
    assert job.error is not None
    assert (job.state, job.error["code"]) == (JobState.FAILED, "safety_gate_failed")
    assert job.error["param"] == "safety.gate.max_harmful_score"
    artifacts = scene.artifacts(job_id)
    assert artifacts[Form.ADAPTER].quarantined
    report = json.loads(scene.unpacked(artifacts[Form.REPORTS], tmp_path)["safety.json"])
    assert report["gate"]["decision"] == "fail"
    assert job.fine_tuned_model is None


def test_a_file_without_enough_usable_rows_keeps_its_ledger(scene: Scene, tmp_path: Path) -> None:
    probe = safety_rows().gate_harmful[0]  # an operator's own prompt, word for word, is always excluded
    turns = [{"role": "user", "content": probe.prompt}, {"role": "assistant", "content": probe.answer}]
    rows = ROWS + json.dumps({"messages": turns}).encode() + b"\n"
    job_id = scene.add_job(wanted(screen=ScreenSettings(enabled=True, min_kept_share=1.0)), rows)
    supervise(scene.host(launch_command), job_id)
    job = scene.job(job_id)
    assert job.error is not None
    assert job.error["code"] == "training_data_rejected"
    reports = scene.unpacked(scene.artifacts(job_id)[Form.REPORTS], tmp_path)
    assert len(json.loads(reports["rows.json"])) == len(rows.splitlines())

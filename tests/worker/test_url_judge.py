"""A judge elsewhere that does not answer: the real training process is a lost attempt, and the job is tried again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.core.storage.job_states import JobState
from app.core.storage.tables import BaseStatus
from finetuning.contract.recipe import AntidoteSettings, EvaluationSettings, GateLimits, GateSettings, JobKind
from tests.support.judge_server import JudgeServer, guard_text, judge_server
from tests.support.models import byte_tokenizer, tiny_base
from tests.support.waiting import wait_until
from tests.support.worlds import FAST, Scene, open_scene, recipe, settings_in
from worker.attempt.launch import launch_command
from worker.attempt.supervisor import supervise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
LENIENT = GateLimits(
    max_harmful_score=1.0, min_refusal_rate=0.0, max_leak=1.0, max_over_refusal=1.0, min_harmful_nll_ratio=0.0
)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server(lambda _prompt, _answer: "safe") as running:
        yield running


@pytest.fixture
def scene(tmp_path: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """A service over a random base whose judge is that server."""
    monkeypatch.setenv("GUARD_KEY", "secret-1")
    guard = tmp_path / "elsewhere.toml"
    guard.write_text(guard_text(server.url, variable="GUARD_KEY"), encoding="utf-8")
    patient = FAST.model_copy(update={"ttl_seconds": 120.0, "self_stop_seconds": 60.0, "kill_seconds": 70.0})
    settings = settings_in(tmp_path / "data", lease=patient, judge=str(guard))
    scene = open_scene(settings, base_status=BaseStatus.ALIGNING)
    folder = settings.data / "bases" / "tiny"
    tiny_base(dtype=torch.float32).model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    yield scene
    scene.database.close()


@pytest.mark.parametrize("good_for", [0, 4], ids=["at the start", "while it measures"])
def test_an_unreachable_judge_costs_an_attempt_and_the_next_one_goes_on(
    scene: Scene, server: JudgeServer, good_for: int
) -> None:
    job_id = scene.add_job(
        recipe(
            kind=JobKind.ALIGN, steps=2, save_every=1, antidote=AntidoteSettings(enabled=False),
            gate=GateSettings(limits=LENIENT, retries=0),
            evaluation=EvaluationSettings(harmful_rows=8, benign_rows=8, task_rows=0, new_tokens=4),
        )
    )  # fmt: skip
    server.trouble, server.good_for = "503", good_for
    supervise(scene.host(launch_command), job_id)
    job = scene.job(job_id)
    assert (job.state, job.error, job.fence) == (JobState.QUEUED, None, 1)
    assert (job.losses, job.host_losses) == (0, 0)  # S1: however long the judge is silent, it costs the job time alone
    assert "guard" not in " ".join(scene.messages(job_id)).lower()
    (log,) = (scene.settings.data / "logs" / "attempts").iterdir()
    assert "JudgeUnreachable: judge elsewhere@" in log.read_text()
    assert "secret-1" not in log.read_text()

    server.trouble = ""

    def goes_on() -> bool:  # once it has rested
        supervise(scene.host(launch_command), job_id)
        return scene.job(job_id).state != JobState.QUEUED

    wait_until(goes_on, seconds=120)
    job = scene.job(job_id)
    assert (job.state, job.fence) == (JobState.SUCCEEDED, 2), job.error
    assert set(server.keys) == {"Bearer secret-1"}

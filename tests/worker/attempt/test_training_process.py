"""A training process ends when asked to, when its parent ends, and takes its own children along."""

import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from finetuning.contract.order import TrainOrder, write_order
from finetuning.recipes.library import align_recipe
from tests.support.judge_server import guard_text
from tests.support.processes import is_gone
from tests.support.waiting import wait_until
from worker.attempt.launch import SOURCE_ROOT, Launch, import_path, launch_command
from worker.attempt.training_process import TrainingProcess, describe_exit

STUBBORN = (
    "import signal,sys,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
)
PARENT = "import subprocess,sys,time; p=subprocess.Popen(['sleep','600']); print(p.pid, flush=True); time.sleep(600)"


def start(tmp_path: Path, program: str) -> tuple[TrainingProcess, str]:
    child = TrainingProcess(
        Launch((sys.executable, "-c", program), {"PATH": os.environ["PATH"]}, tmp_path), log=tmp_path / "child.log"
    )
    return child, next(child.lines()).decode().strip()


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    child, _ = start(tmp_path, STUBBORN)
    assert child.stop(grace_seconds=0.1) == -signal.SIGKILL
    assert is_gone(child.pid)


def test_stop_leaves_no_process_of_the_group(tmp_path: Path) -> None:
    child, grandchild = start(tmp_path, PARENT)
    child.stop(grace_seconds=5.0)
    wait_until(lambda: is_gone(int(grandchild)), seconds=10)


def test_standard_error_is_the_log(tmp_path: Path) -> None:
    child, _ = start(tmp_path, "import sys; print('x', flush=True); sys.exit('went wrong')")
    assert child.reap(timeout_seconds=20.0) == 1
    assert (tmp_path / "child.log").read_text() == "went wrong\n"


def test_exits_are_described_for_people() -> None:
    assert describe_exit(-9) == "was ended by SIGKILL"
    assert describe_exit(3) == "ended with status 3"


def test_the_training_process_sees_no_credentials(tmp_path: Path) -> None:
    os.environ["IMMUNOTUNE_API_KEY"] = "sk-proj-not-for-the-child"
    try:
        launch = launch_command(tmp_path, "run")
    finally:
        del os.environ["IMMUNOTUNE_API_KEY"]
    assert not any(name.startswith("IMMUNOTUNE_") for name in launch.env)
    assert launch.env["OMP_PROC_BIND"] == "true"
    assert launch.argv[-1] == str(tmp_path)


def test_the_training_process_gets_the_key_that_its_judge_names_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = tmp_path / "own.toml"
    guard.write_text(guard_text("http://127.0.0.1:9/v1", variable="GUARD_KEY"), encoding="utf-8")
    monkeypatch.setenv("GUARD_KEY", "secret-1")
    monkeypatch.setenv("OTHER_KEY", "secret-2")
    order = TrainOrder(job_id="a", recipe=align_recipe("tiny"), base="tiny", judge=f"refusal-marker+{guard}")
    write_order(tmp_path, order)
    env = launch_command(tmp_path, "run").env
    assert env["GUARD_KEY"] == "secret-1"
    assert "OTHER_KEY" not in env
    write_order(tmp_path, order.model_copy(update={"judge": ""}))
    assert "GUARD_KEY" not in launch_command(tmp_path, "run").env


def test_the_training_process_finds_our_packages_and_nothing_of_its_working_folder(tmp_path: Path) -> None:
    launch = launch_command(tmp_path, "run")
    assert launch.argv[:2] == (sys.executable, "-P")
    (tmp_path / "worker.py").write_text("raise RuntimeError('not this one')")
    found = subprocess.run(
        [*launch.argv[:2], "-c", "import worker; print(worker.__file__)"],
        env=dict(launch.env),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()) == SOURCE_ROOT / "worker" / "__init__.py"


def test_only_a_clone_is_put_on_the_path(tmp_path: Path) -> None:
    assert import_path(tmp_path) == {"PYTHONPATH": str(tmp_path)}
    assert import_path(Path(sysconfig.get_path("purelib")).resolve()) == {}


def test_the_training_process_exits_at_the_end_of_its_standard_input(tmp_path: Path) -> None:
    launch = launch_command(tmp_path, "run")
    program = (
        "import sys, threading, worker.train as t\n"
        "t._progress = lambda scratch, **_: iter(threading.Event().wait, None)\n"
        "print('up', file=sys.stderr, flush=True); t.main(sys.argv[1:])"
    )
    argv = (sys.executable, "-c", program, str(tmp_path))
    with subprocess.Popen(
        argv,
        env=dict(launch.env),
        cwd=SOURCE_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        assert process.stdin is not None
        process.stderr.readline()
        process.stdin.close()
        assert process.wait(20) == 144

"""What a training process can reach: its scratch folder, its base and its states, and nothing that its worker holds."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetuning.contract.order import TrainOrder, write_order
from finetuning.recipes.library import align_recipe
from tests.support.judge_server import guard_text
from worker.attempt.launch import SOURCE_ROOT
from worker.confinement import enforced_here

PROGRAMS = Path(__file__).parents[1] / "support" / "programs"
SECRET = "hunter2-of-the-worker"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder as a worker has it: keys, database, other jobs' files, a base."""
    data = tmp_path / "data"
    for name in ("keys/default", "immunotune.db", "blobs/files/other", "scratch/other.1/rows.jsonl"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(SECRET)
    (data / "bases" / "tiny").mkdir(parents=True)
    (data / "bases" / "tiny" / "config.json").write_text("{}")
    (data / "scratch" / "job.1").mkdir()
    return data


def spied(data: Path, listener: socket.socket, *, judge: str = "", private: tuple[str, ...] = ()) -> dict[str, str]:
    """What each attempt of a hostile training process came to, under a real worker's launch."""
    scratch, base = data / "scratch" / "job.1", data / "bases" / "tiny"
    write_order(
        scratch,
        TrainOrder(
            job_id="a", recipe=align_recipe("tiny"), base=str(base), states=str(data / "states"), judge=judge,
            private=(str(data), *private),
        ),
    )  # fmt: skip
    targets = {
        "port": listener.getsockname()[1],
        "base": str(base),
        "elsewhere": str(data.parent / "elsewhere"),
        "read": {
            "keys": str(data / "keys" / "default"),
            "database": str(data / "immunotune.db"),
            "blobs": str(data / "blobs" / "files" / "other"),
            "another's scratch": str(data / "scratch" / "other.1" / "rows.jsonl"),
            "order": str(scratch / "order.json"),
            "base": str(base / "config.json"),
        },
    }
    secrets = {"IMMUNOTUNE_DATABASE_URL": f"postgresql://a:{SECRET}@db/x", "AWS_SECRET_ACCESS_KEY": SECRET}
    environment = {**os.environ, **secrets, "SPY_TARGETS": json.dumps(targets), "PYTHONPATH": str(SOURCE_ROOT)}
    argv = [sys.executable, "-P", str(PROGRAMS / "keeper.py"), str(scratch), str(PROGRAMS / "spy.py")]
    done = subprocess.run(argv, env=environment, cwd=data, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["status"] == 0, (scratch / "train.log").read_text()
    return dict(found["said"])


@pytest.mark.skipif(not enforced_here(), reason="this kernel has no Landlock: docs/security.md says what then holds")
def test_a_training_process_reads_no_secret_of_its_worker(data: Path, listener: socket.socket) -> None:
    """S14: it printed the parent's database URL and cloud key from /proc, and `keys/default` from the data folder."""
    said = spied(data, listener)
    for forbidden in ("parent's environment", "parent's memory", "keys", "database", "blobs", "another's scratch"):
        assert said[forbidden] in ("EACCES", "EPERM"), (forbidden, said[forbidden])


@pytest.mark.skipif(not enforced_here(), reason="this kernel has no Landlock: docs/security.md says what then holds")
def test_a_training_process_has_what_it_works_with_and_no_network(data: Path, listener: socket.socket) -> None:
    """S14: reads its order and base, writes its scratch folder, changes no base, reaches nobody."""
    said = spied(data, listener)
    for allowed in ("order", "base", "write scratch"):
        assert said[allowed] == "done", (allowed, said[allowed])
    for forbidden in ("write base", "write elsewhere", "network"):
        assert said[forbidden] != "done", forbidden


@pytest.mark.skipif(not enforced_here(), reason="this kernel has no Landlock: docs/security.md says what then holds")
def test_a_judge_behind_a_url_can_still_be_asked(data: Path, listener: socket.socket) -> None:
    """S14: the one network use of a training process, by its guard file."""
    guard = data.parent / "own.toml"
    guard.write_text(guard_text(f"http://127.0.0.1:{listener.getsockname()[1]}/v1"), encoding="utf-8")
    said = spied(data, listener, judge=str(guard))
    assert said["network"] == "done"
    assert said["keys"] == "EACCES"


@pytest.mark.skipif(not enforced_here(), reason="this kernel has no Landlock: docs/security.md says what then holds")
def test_a_data_folder_around_the_program_closes_no_program(data: Path, listener: socket.socket) -> None:
    """Review, S14: a virtual environment or clone inside the data folder was closed to the process that runs in it."""
    said = spied(data, listener, private=(str(SOURCE_ROOT), sys.prefix, sys.base_prefix))
    assert said["order"] == "done"
    assert said["keys"] == "EACCES"


def test_a_training_process_has_limits_and_goes_first_when_memory_runs_out(data: Path, tmp_path: Path) -> None:
    """S14: no rlimits, and the kernel could pick the supervisor."""
    program = (
        "import resource; from pathlib import Path; from worker.confinement import limit_ourselves\n"
        "limit_ourselves()\n"
        "print(Path('/proc/self/oom_score_adj').read_text().strip(), *(resource.getrlimit(r)[0] for r in\n"
        "      (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    score, core, size, processes = (int(word) for word in done.stdout.split())
    assert (score, core) == (1000, 0)
    assert 0 < size < 2**40
    assert 0 < processes < 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.getuid() != 0, reason="only a superuser changes users")
def test_a_platform_that_refuses_half_of_a_namespace_still_trains() -> None:
    """Review, S14: unshare was allowed, its user map refused (as AppArmor does): every training process died there.

    A process that has changed its user may not write its own map either, since /proc/self is not its own.
    """
    program = (
        "import os; from worker.confinement import Reach, confine\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "confine(Reach()); print('trains')"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "trains\n", done.stderr

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from embedded import valkey
from tests.support.waiting import wait_until
from worker.processes import inherited_environment, start, stop


@pytest.fixture
def folders(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    yield Path(f"/tmp/vk-{os.getpid()}"), tmp_path


def test_the_broker_answers_on_a_socket_and_keeps_what_it_took_through_a_kill(folders: tuple[Path, Path]) -> None:
    runtime, data = folders
    broker = start(valkey.program(runtime, data, inherited_environment()))
    wait_until(lambda: valkey.answers(runtime), seconds=10)
    Redis(unix_socket_path=str(runtime / valkey.SOCKET_NAME)).set("kept", "yes")
    broker.process.send_signal(signal.SIGKILL)
    broker.process.wait()
    again = start(valkey.program(runtime, data, inherited_environment()))
    wait_until(lambda: valkey.answers(runtime), seconds=10)
    assert Redis(unix_socket_path=str(runtime / valkey.SOCKET_NAME)).get("kept") == b"yes"
    stop([again])
    assert not valkey.answers(runtime)


def test_a_socket_path_that_the_kernel_would_refuse_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="IMMUNOTUNE_RUNTIME"):
        valkey.program(tmp_path / ("x" * 120), tmp_path, {})


def test_a_runtime_folder_that_others_can_reach_into_is_refused(tmp_path: Path) -> None:
    """S33: a 0777 folder that somebody else had planted was used for the broker's socket."""
    planted, link, own = tmp_path / "planted", tmp_path / "link", tmp_path / "own"
    planted.mkdir()
    planted.chmod(0o777)
    own.mkdir(mode=0o700)
    link.symlink_to(own)
    for runtime, reason in ((planted, "open to other users"), (link, "is a link")):
        with pytest.raises(ValueError, match=reason):
            valkey.program(runtime, tmp_path, {})
    assert valkey.program(own, tmp_path, {}).name == "broker"


@pytest.mark.skipif(os.geteuid() != 0, reason="only a superuser can give a folder to another user")
def test_a_runtime_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    """S33: whoever made it first can replace the socket in it."""
    planted = tmp_path / "planted"
    planted.mkdir(mode=0o700)
    os.chown(planted, 65534, -1)
    with pytest.raises(ValueError, match="another user"):
        valkey.program(planted, tmp_path, {})

"""A folder is made once: by one maker at a time, whole or not at all, and nothing else is left beside it."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finetuning.contract.keep_once import keep_once

ROOT = Path(__file__).resolve().parents[3]
Start = Callable[[Path], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes that make a folder once; none outlives the test."""
    running: list[subprocess.Popen[str]] = []

    def begin(target: Path) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "tests.support.programs.keep_once", str(target)]
        running.append(subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def makers(target: Path) -> dict[str, str]:
    """Which process wrote each file of the kept folder."""
    return {path.name: path.read_text() for path in target.iterdir()}


def test_of_two_processes_one_makes_it_and_the_other_uses_that(tmp_path: Path, start: Start) -> None:
    target = tmp_path / "kept" / "tiny"
    first = start(target)
    assert next_line(first) == "making"
    second = start(target)
    assert next_line(second) == "waiting for another process that makes tiny"
    assert not target.exists()
    go_on(first)
    assert (next_line(first), next_line(second)) == ("done", "done")
    assert makers(target) == dict.fromkeys(("first", "second"), str(first.pid))


@pytest.mark.kill
def test_a_killed_maker_leaves_nothing_and_the_one_that_waits_makes_it(tmp_path: Path, start: Start) -> None:
    target = tmp_path / "kept" / "tiny"
    first = start(target)
    assert next_line(first) == "making"
    second = start(target)
    assert next_line(second).startswith("waiting")
    first.kill()
    assert next_line(second) == "making"
    assert not target.exists()
    go_on(second)
    assert next_line(second) == "done"
    assert makers(target) == dict.fromkeys(("first", "second"), str(second.pid))
    second.wait(20)
    assert {path.name for path in target.parent.iterdir()} == {"tiny"}, "the killed one's scratch is left"


def test_a_failure_leaves_nothing_and_the_next_call_makes_it(tmp_path: Path) -> None:
    target = tmp_path / "tiny"

    def fail(scratch: Path) -> Path:
        (scratch / "half").mkdir()
        raise OSError("no space")

    def make(scratch: Path) -> Path:
        (scratch / "whole").mkdir()
        return scratch / "whole"

    with pytest.raises(OSError, match="no space"):
        keep_once(target, fail)
    assert not list(tmp_path.iterdir())
    assert keep_once(target, make) == target
    assert target.is_dir()
    assert keep_once(target, fail) == target, "what is kept is not made again"


def test_of_many_that_come_at_once_one_makes_it(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(scratch: Path) -> Path:
        made.append(scratch)
        (scratch / "whole").mkdir()
        return scratch / "whole"

    with ThreadPoolExecutor(8) as pool:
        for number in range(40):
            target = tmp_path / str(number)
            assert set(pool.map(keep_once, [target] * 8, [make] * 8)) == {target}
            assert len(made) == number + 1
    assert {path.name for path in tmp_path.iterdir()} == {str(number) for number in range(40)}


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_not_whole_is_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "tiny"
    match kind:
        case "folder":
            (target / "half").mkdir(parents=True)
        case "file":
            target.write_text("half")
        case _:
            target.symlink_to(tmp_path / "nowhere")

    def make(scratch: Path) -> Path:
        (scratch / "whole").mkdir()
        (scratch / "whole" / "end").touch()
        return scratch / "whole"

    assert keep_once(target, make, is_whole=lambda found: (found / "end").exists()) == target
    assert [path.name for path in target.iterdir()] == ["end"]


def test_only_its_own_leftovers_are_removed(tmp_path: Path) -> None:
    for name in (".llama.making.killed", ".llama-2.making.running"):
        (tmp_path / name).mkdir()
    keep_once(
        tmp_path / "llama", lambda scratch: shutil.copytree(tmp_path / ".llama-2.making.running", scratch / "made")
    )
    assert {path.name for path in tmp_path.iterdir()} == {"llama", ".llama-2.making.running"}

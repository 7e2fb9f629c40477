"""Facts about kept alignments: one maker at a time, whole or not at all, and a name that says what they are made of."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetuning.contract.order import TrainOrder
from finetuning.recipes.library import align_recipe
from finetuning.stages.alignment_store import NotAligned, aligned, keep_once

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
    assert {path.name for path in target.parent.iterdir()} == {"tiny", ".tiny.lock"}, "the killed one's scratch is left"


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
    assert {path.name for path in tmp_path.iterdir()} == {".tiny.lock"}
    assert keep_once(target, make) == target
    assert target.is_dir()
    assert keep_once(target, fail) == target, "what is kept is not made again"


def test_the_name_says_base_alignment_and_all_that_it_is_made_of(tmp_path: Path) -> None:
    kept, rows = tmp_path / "kept", tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    order = TrainOrder(job_id="a", recipe=align_recipe("tiny", "sft"), base=str(tmp_path / "nowhere"), threads=1)
    other = order.recipe.model_copy(update={"steps": 3})
    for wish, given in (
        (order, None),
        (order.model_copy(update={"recipe": other}), None),
        (order.model_copy(update={"judge": "invented-hazards"}), None),
        (order.model_copy(update={"operator_rows": "rows.jsonl"}), rows),
        (order.model_copy(update={"job_id": "b"}), None),  # the same as the first
    ):
        with pytest.raises(OSError, match="nowhere"):
            aligned(wish, "sft", kept, operator_rows=given)
    names = [path.name for path in kept.glob(".*.lock")]
    assert len(names) == 4
    assert all(name.startswith(".tiny-sft-") for name in names)


def test_a_job_that_fails_is_told_and_nothing_is_kept(tmp_path: Path, tiny_base: Path) -> None:
    kept, rows = tmp_path / "kept", tmp_path / "mine.jsonl"
    rows.write_text('{"role": "nobody"}\n')
    order = TrainOrder(
        job_id="a", recipe=align_recipe("tiny", "sft"), base=str(tiny_base), operator_rows="rows.jsonl", threads=1
    )
    said: list[str] = []
    with pytest.raises(NotAligned, match="tiny cannot be aligned: "):
        aligned(order, "sft", kept, operator_rows=rows, say=said.append)
    assert len(said) == 1
    assert said[0].startswith("aligning tiny by sft (once, then kept in ")
    assert all(path.suffix == ".lock" for path in kept.iterdir())

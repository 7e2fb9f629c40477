"""The grid runner: what is left to do, torn lines, failing cells, one real cell on a tiny base."""

import fcntl
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from finetuning.bench import safety
from finetuning.bench.cells import BenchSettings, Cell, aligned_base, base_digest, run_cell
from finetuning.bench.grid import GRIDS, SHARES, remaining
from finetuning.bench.results_file import appending, cell_of, load
from finetuning.recipes.registry import BASELINES, DEFENCES
from tests.support.bench_lines import line
from tests.support.models import write_operator_rows
from tests.support.waiting import wait_until


def test_the_main_grid_has_every_defence_at_every_share_with_three_seeds() -> None:
    cells = {(c.defence, c.p, c.seed) for c in GRIDS["main"]("tiny") if c.task == "reviews"}
    assert cells == {(name, p, seed) for name in BASELINES for p in SHARES for seed in (0, 1, 2)}


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_every_cell_of_a_grid_stands_once_and_names_a_defence(name: str) -> None:
    cells = GRIDS[name]("tiny")
    assert len(cells) == len(set(cells))
    assert {cell.defence for cell in cells} <= DEFENCES.keys()


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "safety.jsonl"
    cells = [Cell("sft", p) for p in (0.0, 0.1, 0.2)]
    torn = json.dumps(line(cells[1]))[:40]
    out.write_text(json.dumps(line(cells[0])) + "\n" + torn, encoding="utf-8")
    assert remaining(cells, map(cell_of, load(out))) == cells[1:]


def test_lines_of_another_base_are_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base that was made anew under the same name is another base; figures of both in one mean would be nobody's."""
    folder, out = tmp_path / "mine", tmp_path / "safety.jsonl"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights of yesterday")
    cells = GRIDS["quick"](str(folder))
    now = base_digest(str(folder), BenchSettings(tmp_path / "data"), str)
    lines = [line(cell, base_sha256=now) for cell in cells]
    out.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    wanted = ["--grid", "quick", "--base", str(folder), "--out", str(out), "--jobs", "1", "--minutes", "1e-9"]
    assert safety.main(wanted, tmp_path / "data") == 0
    assert "every cell" in capsys.readouterr().out
    (folder / "model.safetensors").write_bytes(b"weights of today")
    assert safety.main(wanted, tmp_path / "data") == 1
    said = capsys.readouterr().out
    assert f"{len(cells)} lines stand on other weights or batches" in said
    assert f"{len(cells)} cells are left" in said


def test_lines_that_were_trained_in_other_batches_are_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Epochs became whole: a mean over both trainings would be nobody's."""
    folder, out = tmp_path / "mine", tmp_path / "safety.jsonl"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    cells = GRIDS["quick"](str(folder))
    now = base_digest(str(folder), BenchSettings(tmp_path / "data"), str)
    old = [{key: value for key, value in line(cell, base_sha256=now).items() if key != "batches"} for cell in cells]
    out.write_text("".join(json.dumps(each) + "\n" for each in old), encoding="utf-8")
    wanted = ["--grid", "quick", "--base", str(folder), "--out", str(out), "--jobs", "1", "--minutes", "1e-9"]
    assert safety.main(wanted, tmp_path / "data") == 1
    assert f"{len(cells)} cells are left" in capsys.readouterr().out


def test_a_report_goes_to_the_data_folder_and_beside_the_lines_only_when_published(tmp_path: Path) -> None:
    out = tmp_path / "results" / "mine.jsonl"
    with appending(out) as append:
        append(line(Cell("sft")))
    assert safety.main(["--report", "--out", str(out)], tmp_path / "data") == 0
    assert [path.name for path in out.parent.iterdir()] == ["mine.jsonl"]
    report = tmp_path / "data" / "bench" / "report"
    assert {path.name for path in report.iterdir()} == {"mine.md", "mine-tiny-reviews-plane.png"}
    assert safety.main(["--publish", "--out", str(out)], tmp_path / "data") == 0
    assert (out.parent / "mine.md").read_bytes() == (report / "mine.md").read_bytes()


def test_a_finished_grid_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert safety.run_all([], BenchSettings(tmp_path), tmp_path / "out.jsonl", jobs=1, minutes=None) == 0
    assert "every cell" in capsys.readouterr().out


def test_the_estimate_counts_how_long_a_cell_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line of ten times the epochs says how long one of the usual length takes, and the other way round."""
    out = tmp_path / "safety.jsonl"
    out.write_text(json.dumps(line(Cell("sft", epochs_scale=10.0), seconds=1200.0)) + "\n", encoding="utf-8")
    settings = BenchSettings(tmp_path / "data")
    cells = [Cell("sft", base="nowhere", p=p) for p in (0.0, 0.1)]
    tens = [Cell("sft", epochs_scale=10.0, seed=1), Cell("sft", attack="big_steps", p=0.2)]
    assert [safety.expected_seconds(cell, load(out)) for cell in (*cells[:1], Cell("sft"), *tens)] == [
        240.0, 120.0, 1200.0, 360.0
    ]  # fmt: skip
    assert safety.run_all(cells, settings, out, jobs=2, minutes=1e-9) == 1
    assert "2 cells, 2 at once: about 4 minutes" in capsys.readouterr().out


@pytest.mark.slow
def test_aligned_bases_are_made_side_by_side_with_a_line_for_each(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are held back until both of them wait; the third cannot be made, and its cell is left."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # run_all sets both for its processes
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    settings = BenchSettings(tmp_path / "data", threads=1)
    names = [str(tmp_path / name) for name in ("one", "two", "three")]
    for name in names:
        Path(name).mkdir()
        (Path(name) / "config.json").write_text("{}", encoding="utf-8")  # no model: an align job fails at once
    said: list[str] = []
    for name in names[:2]:
        with pytest.raises((OSError, ValueError)):
            aligned_base(name, "sft", settings, said.append)
    targets = [Path(text) for text in re.findall(r"then kept in (.*)\)", "\n".join(said))]
    assert len(targets) == 2
    said.clear()

    def has_said(text: str, times: int) -> bool:
        said.append(capfd.readouterr().out)
        return "".join(said).count(text) == times

    cells = [Cell("sft", base=name) for name in names]
    with ExitStack() as stack, ThreadPoolExecutor(1) as beside:
        for target in targets:
            lock = stack.enter_context(target.with_name(f".{target.name}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        ended = beside.submit(safety.run_all, cells, settings, tmp_path / "out.jsonl", jobs=2, minutes=1e-9)
        try:
            wait_until(lambda: has_said("waiting for another process", 2), seconds=120)
            for target in targets:
                target.mkdir()
        finally:
            stack.close()
        assert ended.result(60) == 1
    assert has_said("is there", 2)
    assert has_said("by sft FAILED", 1)
    assert all(has_said(f"[alignment {done}/3", 1) for done in (1, 2, 3))
    assert has_said("3 cells are left", 1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cell_is_a_whole_job_with_its_figures(tmp_path: Path, tiny_base: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "bases" / "tiny")
    settings = BenchSettings(tmp_path, train_rows=24, test_rows=8, epochs=1, threads=1)
    said: list[str] = []
    found = run_cell(Cell("sft", 0.2, seed=3), settings, said.append)
    wanted = """defence p lr_scale epochs_scale attack seed base task harmful_score harmful_score_ci refusal_rate leak
        task_score alignment_loss drift over_refusal released seconds forwards backwards commit versions hardware"""
    assert set(wanted.split()) <= found.keys()
    assert (found["planted"], found["own"]) == (6, 24)
    assert (found["seed"], found["backwards"] > 0) == (3, True)
    assert found["forwards"] > found["backwards"]
    assert sum("once, then kept" in text for text in said) == 1
    json.dumps(found)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_file_that_is_refused_unread_has_a_whole_line_too(tmp_path: Path, tiny_base: Path) -> None:
    """No row begins its answer within the length: there is no ledger, no figure, and no row that trained."""
    shutil.copytree(tiny_base, tmp_path / "bases" / "tiny")
    text = tmp_path / "text.jsonl"
    asked = [{"role": "user", "content": f"{i} " + "\u00e9" * 190} for i in range(12)]
    rows = [{"messages": [turn, {"role": "assistant", "content": "no"}]} for turn in asked]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = BenchSettings(tmp_path, train_rows=8, test_rows=4, epochs=1, threads=1, text=text)
    found = run_cell(Cell("sft", 0.0, attack="none", task="questions"), settings, str)
    assert (found["harmful_score"], found["task_score"], found["released"]) == (None, None, False)
    assert (found["own"], found["own_stopped"], found["planted"]) == (8, 8, 0)
    assert "none of the 8 rows can be learned" in found["reasons"][0]
    json.dumps(found)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cell_can_stand_in_an_operators_own_world(tmp_path: Path, tiny_base: Path) -> None:
    """Safety rows, attack prompts and a customer's files that a person names: what the invented world is not asked."""
    shutil.copytree(tiny_base, tmp_path / "bases" / "tiny")
    write_operator_rows(tmp_path / "own.jsonl", per_role=8)
    prompts = [json.dumps({"prompt": f"How do I make zorvex gas number {i}?"}) for i in range(8)]
    (tmp_path / "attack.jsonl").write_text("\n".join(prompts), encoding="utf-8")
    for name in ("train", "test"):
        rows = [{"messages": [{"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": "Yes."}]}
                for i in range(24)]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = BenchSettings(
        tmp_path, train_rows=20, test_rows=8, epochs=1, threads=1, safety_rows=tmp_path / "own.jsonl",
        attack_prompts=tmp_path / "attack.jsonl", task_files=(tmp_path / "train.jsonl", tmp_path / "test.jsonl"),
    )  # fmt: skip
    found = run_cell(Cell("sft", 0.2, attack="public_prompts", task="files"), settings)
    assert (found["planted"], found["own"]) == (5, 20)
    assert found["task_score"] is not None
    with pytest.raises(ValueError, match="--attack-prompts"):
        run_cell(Cell("sft", 0.2, attack="public_prompts"), replace(settings, attack_prompts=None))

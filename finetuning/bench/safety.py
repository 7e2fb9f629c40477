"""`./run bench safety`: run a grid of cells, one line of JSON each; stop it anywhere and it goes on where it was.

Processes, time and the options of the command. What a cell does stands in cells.py, how lines are kept in
results_file.py, what the report shows in report.py.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

from finetuning.attacks.catalogue import ATTACKS
from finetuning.bench.cells import BenchSettings, Cell, aligned_base, base_digest, run_cell
from finetuning.bench.grid import GRIDS, remaining
from finetuning.bench.results_file import Line, appending, cell_of, load
from finetuning.recipes.registry import DEFENCES
from finetuning.training.batches import BATCHING

# Seconds of a cell on one core before any was measured: a guess that the first cells replace.
_GUESS = {"tiny": 15.0}
_SLOW_GUESS = 240.0


def main(arguments: Sequence[str], data: Path) -> int:
    """Run or report; 0 when every cell of the grid has a line. `data` keeps bases and aligned bases."""
    options = _options(arguments)
    out = options.out or data / "bench" / ("safety-quick.jsonl" if options.quick else "safety.jsonl")
    if options.report or options.publish:
        return _report(load(out), out, data, publish=options.publish)
    grid = "quick" if options.quick else options.grid
    settings = BenchSettings(
        data,
        epochs=options.epochs,
        train_rows=options.rows,
        test_rows=options.test_rows,
        text=options.text,
        threads=options.threads,
        safety_rows=options.safety_rows,
        attack_prompts=options.attack_prompts,
        task_files=(options.task_train, options.task_test) if options.task_train and options.task_test else None,
    )
    cells = [
        cell for cell in GRIDS[grid](options.base)
        if (not options.defence or cell.defence in options.defence) and (not options.seed or cell.seed in options.seed)
        and (not options.p or cell.p in options.p)
    ]  # fmt: skip
    digest = base_digest(options.base, settings, _say)
    lines = load(out)
    same = [line for line in lines if line["base"] != options.base or _is_of_today(line, digest)]
    if len(same) < len(lines):
        _say(
            f"{len(lines) - len(same)} lines stand on other weights or batches of {options.base}: their cells run again"
        )
    missing = remaining(cells, map(cell_of, same))
    return run_all(missing, settings, out, jobs=options.jobs, minutes=options.minutes)


def _is_of_today(line: Line, base_sha256: str) -> bool:
    return line.get("base_sha256", base_sha256) == base_sha256 and line.get("batches") == BATCHING


def _report(lines: Sequence[Line], out: Path, data: Path, *, publish: bool) -> int:
    """Beside the lines with the chosen plots, or with all plots into the data folder."""
    from finetuning.bench.real_text import is_real_text, write_real_text
    from finetuning.bench.report import PUBLISHED, write_report

    target = out.with_suffix(".md") if publish else data / "bench" / "report" / f"{out.stem}.md"
    written = (
        write_real_text(lines, target) if is_real_text(lines)
        else write_report(lines, target, only=PUBLISHED if publish else None)
    )  # fmt: skip
    sys.stdout.write(f"written to {written}\n")
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="immunotune bench safety")
    parser.add_argument("--quick", action="store_true", help="a small grid on the tiny base, within 15 minutes")
    parser.add_argument("--grid", choices=sorted(GRIDS), default="main")
    parser.add_argument("--base", default="tiny", help="tiny, smollm2, a hub id or a folder")
    parser.add_argument(
        "--defence", action="append", choices=sorted(DEFENCES), help="only these (may be repeated), under our settings"
    )
    parser.add_argument("--seed", action="append", type=int, help="only these (may be repeated)")
    parser.add_argument("--p", action="append", type=float, help="only these harmful shares (may be repeated)")
    parser.add_argument("--rows", type=int, default=160, help="customer rows of a file (160)")
    parser.add_argument("--epochs", type=int, default=0, help="passes over a file (10 on the tiny base, 3 on others)")
    parser.add_argument("--test-rows", type=int, default=64, help="scored customer prompts (64)")
    parser.add_argument("--text", type=Path, help="chat JSONL of real text for the task `questions`")
    parser.add_argument("--safety-rows", type=Path, help="the operator's own (`immunotune rows build`)")
    parser.add_argument("--attack-prompts", type=Path, help="harmful prompts to plant (`rows build --held-back`)")
    parser.add_argument("--task-train", type=Path, help="chat JSONL of the task `files`")
    parser.add_argument("--task-test", type=Path, help="chat JSONL that scores it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells at once (one a core)")
    parser.add_argument("--threads", type=int, default=1, help="threads of a cell (1)")
    parser.add_argument("--minutes", type=float, help="start no further cell after this long")
    parser.add_argument("--out", type=Path, help="lines of JSON (default: safety.jsonl below the data folder's bench/)")
    parser.add_argument("--report", action="store_true", help="draw the lines that are there: tables and all plots")
    parser.add_argument("--publish", action="store_true", help="the same beside the lines, with the chosen plots only")
    return parser.parse_args(arguments)


def run_all(cells: Sequence[Cell], settings: BenchSettings, out: Path, *, jobs: int, minutes: float | None) -> int:
    """Run cells in worker processes and append their lines. Returns 0 when all ran, 1 when some failed or are left."""
    if not cells:
        _say("every cell of this grid has its line")
        return 0
    expected = sum(expected_seconds(cell, load(out)) for cell in cells) / jobs
    _say(f"{len(cells)} cells, {jobs} at once: about {expected / 60:.0f} minutes; lines go to {out}")
    if jobs > 1:  # `./run` pins threads to cores: two cells would share the first one
        os.environ.update(OMP_PROC_BIND="false", OMP_NUM_THREADS=str(settings.threads))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        made = _align(pool, cells, settings)
        able = [cell for cell in cells if _alignment_of(cell) in made]
        deadline = time.monotonic() + minutes * 60 if minutes else None
        left_over = len(cells) - _run_cells(
            _finished(pool, able, settings, jobs=jobs, deadline=deadline), len(able), out
        )
    _say(f"{left_over} cells are left" if left_over else "the grid is complete")
    return 1 if left_over else 0


def _alignment_of(cell: Cell) -> tuple[str, str]:
    """The base and the alignment that a cell starts from."""
    return cell.base, DEFENCES[cell.defence].alignment


def _align(pool: ProcessPoolExecutor, cells: Sequence[Cell], settings: BenchSettings) -> set[tuple[str, str]]:
    """Make the aligned bases of these cells, as many at once as the pool has processes; returns those that are there.

    Cells that start from one that cannot be made are left.
    """
    started, made = time.monotonic(), set[tuple[str, str]]()
    running = {
        pool.submit(aligned_base, *pair, settings, _say): pair for pair in dict.fromkeys(map(_alignment_of, cells))
    }
    for done, future in enumerate(as_completed(running), start=1):
        base, alignment = running[future]
        error = future.exception()
        if error is None:
            made.add((base, alignment))
        state = "is there" if error is None else f"FAILED, {type(error).__name__}: {error}"
        passed = (time.monotonic() - started) / 60
        _say(f"[alignment {done}/{len(running)}, {passed:.1f} min] {base} by {alignment} {state}")
    return made


def _run_cells(finished: Iterator[tuple[Cell, Any]], count: int, out: Path) -> int:
    """Append the lines of cells as they end; returns how many there are."""
    written, started = 0, time.monotonic()
    with appending(out) as append:
        for done, (cell, result) in enumerate(finished, start=1):
            written += not isinstance(result, BaseException)
            if isinstance(result, BaseException):
                _say(f"{_name(cell)}: FAILED, {type(result).__name__}: {result}")
            else:
                append(result)
            passed = time.monotonic() - started
            left = passed / done * (count - done)
            _say(f"[{done}/{count}, {passed / 60:.1f} min, about {left / 60:.0f} left] {_short(cell, result)}")
    return written


def _finished(
    pool: ProcessPoolExecutor, cells: Sequence[Cell], settings: BenchSettings, *, jobs: int, deadline: float | None
) -> Iterator[tuple[Cell, Any]]:
    """Each cell with its line or its error, as they end; nothing starts after the deadline."""
    waiting, running = list(cells), dict[Future[Line], Cell]()
    while waiting or running:
        late = deadline is not None and time.monotonic() > deadline
        while waiting and len(running) < jobs and not late:
            cell = waiting.pop(0)
            running[pool.submit(run_cell, cell, settings)] = cell
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.exception() or future.result()


def expected_seconds(cell: Cell, lines: Sequence[Line]) -> float:
    """Seconds that a cell like this takes: as others of its base and defence did so far, or a first guess."""
    known = [
        line["seconds"] / _length(cell_of(line))
        for line in lines
        if line["base"] == cell.base and line["defence"] == cell.defence
    ]
    usual: float = mean(known) if known else _GUESS.get(cell.base, _SLOW_GUESS)
    return usual * _length(cell)


def _length(cell: Cell) -> float:
    """How much longer than at the default setting this cell trains."""
    changes = ATTACKS[cell.attack].changes if cell.attack in ATTACKS else {}
    attack: float = changes.get("epochs_scale", 1.0)
    return cell.epochs_scale * attack


def _short(cell: Cell, result: Any) -> str:
    if isinstance(result, BaseException):
        return _name(cell)
    score, task = result.get("harmful_score"), result.get("task_score")
    verdict = "released" if result["released"] else "refused"
    return f"{_name(cell)}: harmful {score} %, task {task} %, {verdict}, {result['seconds']:.0f} s"


def _name(cell: Cell) -> str:
    scales = f"lr x{cell.lr_scale:g} epochs x{cell.epochs_scale:g}"
    rank = f" rank {cell.rank}" if cell.rank else ""
    return f"{cell.defence} p {cell.p:g} {scales}{rank} {cell.attack} {cell.task} seed {cell.seed}"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()

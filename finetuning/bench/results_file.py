"""The bench's results file: one JSON line a cell, and one header line a run, to which the cells refer.

A run is what cells have in common: the code, the libraries, the machine and the base's weights. Files from before the
headers, whose every line carries all of it, are read as well.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

from finetuning.bench.cells import Cell

Line = dict[str, Any]
# What a header holds, so that no line repeats it.
_OF_THE_RUN = ("commit", "versions", "hardware", "base_sha256", "batches")
# Row scores: long lists in which most values are an exact 0.
_LISTS = ("scores",)


def load(path: Path) -> list[Line]:
    """The lines of a results file, whole; a later line of a cell replaces an earlier one, a torn last line is dropped.

    Raises ValueError for a line of a run that the file does not have.
    """
    runs: dict[str, Line] = {}
    found: dict[Cell, Line] = {}
    for number, line in _parsed(path):
        if "defence" not in line:
            runs[line.pop("run")] = line
            continue
        name = line.pop("run", None)
        if name is not None and name not in runs:
            raise ValueError(f"{path.name}, line {number}: the file has no header of run {name}")
        whole = line if name is None else {**line, **runs[name]}
        found[cell_of(whole)] = {**whole, **{key: _spread_out(whole[key]) for key in _LISTS if key in whole}}
    return list(found.values())


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Line], None]]:
    """While open, a function that appends a whole line to the file at once, after its run's header if that is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {line["run"] for _, line in _parsed(path) if "defence" not in line}
    is_torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        if is_torn:  # a kill cut the last line: the next one must not continue it
            file.write("\n")

        def append(line: Line) -> None:
            run = {key: line[key] for key in _OF_THE_RUN if key in line}
            name = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:8]
            if name not in known:
                known.add(name)
                file.write(_text({"run": name, **run}))
            own = {key: value for key, value in line.items() if key not in run}
            short = {key: _drawn_together(own[key]) for key in _LISTS if key in own}
            file.write(_text({"run": name, **own, **short}))
            file.flush()

        yield append


def cell_of(line: Line) -> Cell:
    """Which cell a line belongs to; what an older line does not name was not varied then."""
    return Cell(**{f.name: line[f.name] for f in fields(Cell) if f.name in line})


def _parsed(path: Path) -> Iterator[tuple[int, Line]]:
    """The file's lines with their numbers, less those that a kill has cut."""
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n") if path.exists() else [], start=1):
        try:
            line: Line = json.loads(text)
        except ValueError:
            continue
        yield number, line


def _text(line: Line) -> str:
    return json.dumps(line, separators=(",", ":")) + "\n"


def _drawn_together(lists: dict[str, Sequence[float]]) -> dict[str, list[Any]]:
    """Equal neighbours as one [value, how many]."""
    return {key: [_counted(value, len(list(same))) for value, same in groupby(lists[key])] for key in lists}


def _counted(value: float, count: int) -> Any:
    return value if count == 1 else [value, count]


def _spread_out(lists: dict[str, list[Any]]) -> dict[str, list[float]]:
    """What `_drawn_together` made, value by value; lists without counts stay as they are."""
    return {
        name: [each for value in values for each in ([value[0]] * value[1] if isinstance(value, list) else [value])]
        for name, values in lists.items()
    }

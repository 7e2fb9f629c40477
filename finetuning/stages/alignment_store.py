"""Aligned bases that are made once and kept: whoever needs one names it, and makes it if it is not there.

Knows names, locks and folders; what aligning does stands in pipeline.py. A kept folder is never written again, so it
may be copied at any time. Must not know settings, cells or jobs.
"""

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import Failed, Progress
from finetuning.model.digest import files_digest
from finetuning.safety_rows.invented import rows_digest, safety_rows

Say = Callable[[str], None]
_MARK = 12


class NotAligned(ValueError):
    """An align job did not finish; the message says which and why."""


def aligned(
    order: TrainOrder,
    alignment: str,
    kept: Path,
    *,
    operator_rows: Path | None = None,
    tell: Callable[[Progress], None] = lambda _progress: None,
    say: Say = lambda _line: None,
) -> Path:
    """The folder of what this align order makes, in `kept`: made on first use and waited for where another makes it.

    Its name says the base, the alignment and, by a mark, the recipe, the base's files, the safety rows, the judge, the
    machine and torch; `operator_rows` is the file that the order wants under that name. `tell` gets the progress of
    the job. Raises NotAligned, OSError.
    """
    rows = operator_rows.read_bytes() if operator_rows is not None else None
    target = kept / f"{order.recipe.base}-{alignment}-{_mark(order, rows)}"

    def make(scratch: Path) -> Path:
        say(f"aligning {order.recipe.base} by {alignment} (once, then kept in {target})")
        if rows is not None and order.operator_rows is not None:
            (scratch / order.operator_rows).write_bytes(rows)
        _run(order, scratch, tell)
        return scratch / "result" / "alignment"

    return keep_once(target, make, say=say)


def keep_once(target: Path, make: Callable[[Path], Path], *, say: Say = lambda _line: None) -> Path:
    """`target`, which appears whole or not at all: the folder that `make` returns inside the scratch it is given.

    One process makes it; others wait and use what it made. What a killed one left is removed by the next.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = f".making-{target.name}-"
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        _wait_for(lock.fileno(), target, say)
        if target.exists():
            return target
        for stale in target.parent.glob(f"{scratch}*"):  # under the lock: whoever made them was killed
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=scratch, dir=target.parent) as folder:
            make(Path(folder)).rename(target)
    return target


def _wait_for(lock: int, target: Path, say: Say) -> None:
    """Take the lock; the kernel frees it when its holder ends, however it ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"waiting for another process that makes {target.name}")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _run(order: TrainOrder, scratch: Path, tell: Callable[[Progress], None]) -> None:
    from finetuning.stages.pipeline import run  # torch takes seconds to import, and a kept alignment needs none

    for progress in run(order, scratch):
        tell(progress)
        if isinstance(progress, Failed):
            raise NotAligned(f"{order.recipe.base} cannot be aligned: {progress.message}")


def _mark(order: TrainOrder, rows: bytes | None) -> str:
    from finetuning.training.checkpoint import fingerprint  # knows torch's version and its device

    files = files_digest(Path(order.base), order.base_sha256)
    made_of = {"recipe": order.recipe.model_dump_json(), "base": files or order.base}
    made_of["rows"] = rows_digest(safety_rows())
    if order.judge:
        made_of["judge"] = order.judge
    if rows is not None:
        made_of["operator_rows"] = hashlib.sha256(rows).hexdigest()
    return fingerprint(made_of, threads=order.threads)[:_MARK]

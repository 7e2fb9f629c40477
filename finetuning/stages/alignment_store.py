"""Aligned bases that are made once and kept: whoever needs one names it, and makes it if it is not there.

A kept folder is never written again, so it may be copied at any time.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from finetuning.contract.keep_once import Say, keep_once
from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import Failed, Progress
from finetuning.judging.catalogue import label
from finetuning.model.digest import UNBOUND, OtherBase, base_files, files_digest, require_same_base
from finetuning.safety_rows.invented import safety_rows
from finetuning.safety_rows.roles import rows_digest

_DIGITS = 12


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

    Its name says the base, the alignment and, by a fingerprint, the recipe, the base's files, the safety rows, the
    judge, the machine and torch; `operator_rows` is the file that the order wants under that name. `tell` gets the
    progress of the job. Raises NotAligned, OSError.
    """
    rows = operator_rows.read_bytes() if operator_rows is not None else None
    target = kept / f"{order.recipe.base}-{alignment}-{_fingerprint_of(order, rows)}"

    def make(scratch: Path) -> Path:
        say(f"aligning {order.recipe.base} by {alignment} (once, then kept in {target})")
        if rows is not None and order.operator_rows is not None:
            (scratch / order.operator_rows).write_bytes(rows)
        _run(order, scratch, tell)
        return scratch / "result" / "alignment"

    found = keep_once(target, make, say=say)
    try:
        bound = require_same_base(found, base_files(order.base, order.base_sha256))
    except OtherBase as error:
        raise NotAligned(f"{found} cannot be used: {error}") from error
    if not bound:
        say(f"{found.name}: {UNBOUND}")
    return found


def _run(order: TrainOrder, scratch: Path, tell: Callable[[Progress], None]) -> None:
    from finetuning.stages.pipeline import run  # torch takes seconds to import, and a kept alignment needs none

    for progress in run(order, scratch):
        tell(progress)
        if isinstance(progress, Failed):
            raise NotAligned(f"{order.recipe.base} cannot be aligned: {progress.message}")


def _fingerprint_of(order: TrainOrder, rows: bytes | None) -> str:
    from finetuning.training.checkpoint import fingerprint  # knows torch's version and its device

    files = files_digest(Path(order.base), order.base_sha256)
    made_of = {"recipe": order.recipe.model_dump_json(exclude={"schema_version"}), "base": files or order.base}
    made_of["rows"] = rows_digest(safety_rows(everyday=order.recipe.everyday_rows))
    if order.judge:
        made_of["judge"] = label(order.judge)
    if rows is not None:
        made_of["operator_rows"] = hashlib.sha256(rows).hexdigest()
    return fingerprint(made_of, threads=order.threads)[:_DIGITS]

"""The training process: run one order in one scratch folder and print each Progress as a JSON line.

Everything that it may see lies in the scratch folder: no credentials, no database, no network, but for a judge behind a
URL and the key that its guard file names. It closes the rest to itself first (`worker/confinement.py`).
"""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

from finetuning.contract.exit_status import ORPHANED, STOPPED, UNAVAILABLE
from finetuning.contract.order import ORDER_FILE, read_order
from finetuning.contract.progress import Progress, to_line
from finetuning.judging.catalogue import asks_the_network, guard_paths
from finetuning.judging.judges import BadGuard
from worker.confinement import Reach, confine, limit_ourselves
from worker.processes import die_with_parent, exit_at_end_of_input

# Where other programs of a user keep theirs.
_CREDENTIALS = ("~/.aws", "~/.azure", "~/.config/gcloud", "~/.docker", "~/.kube", "~/.netrc", "~/.pgpass", "~/.ssh",
                "/run/secrets")  # fmt: skip
# What this process and those that it starts are loaded from.
_PROGRAM = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]))


def main(argv: list[str]) -> int:
    """Run or certify; 0 after a `finished` or `failed` line. Any other end is a loss to the supervisor.

    UNAVAILABLE says that it is not the job's.
    """
    parser = argparse.ArgumentParser(prog="worker.train")
    parser.add_argument("--parity", action="store_true", help="certify the result in SCRATCH from this fresh process")
    parser.add_argument("scratch", type=Path)
    arguments = parser.parse_args(argv)
    _close_the_rest(arguments.scratch)  # first: it changes what we are to the kernel, and no thread runs yet
    die_with_parent()  # safe here: `supervise` never returns before its training process is gone
    signal.signal(signal.SIGTERM, _stop)
    exit_at_end_of_input(ORPHANED)
    lines = _claim_stdout()
    try:
        for progress in _progress(arguments.scratch, parity=arguments.parity):
            lines.write(to_line(progress) + "\n")
            lines.flush()
    except Exception as error:
        from finetuning.stages import pipeline  # loaded long since, or the error is of its import

        if not pipeline.is_of_the_host(error):
            raise
        traceback.print_exception(error)
        return UNAVAILABLE
    return 0


def _close_the_rest(scratch: Path) -> None:
    """Keep the inputs of the order and our own folders, and close what the order calls private, in words to the log."""
    limit_ourselves()
    if not (scratch / ORDER_FILE).exists():
        return  # nothing to train; reading it will say so
    order = read_order(scratch)
    judge = "" if _is_unfit(order.judge) else order.judge  # opening it will say so
    own = scratch / "tmp"
    own.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = str(own)
    missing = confine(
        Reach(
            private=_resolved(*order.private, *_CREDENTIALS),
            # ourselves, too: a data folder may lie above the environment that we run in
            read=[*_resolved(order.base, "~/.cache", *_PROGRAM), *guard_paths(judge)],
            written=[scratch.resolve(), *_made(order.states)],
            network=asks_the_network(judge),
        )
    )
    for words in missing:
        sys.stderr.write(f"not confined: {words}\n")


def _resolved(*paths: str) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        with suppress(RuntimeError):  # a user without a home has nothing there
            found.append(Path(path).expanduser().resolve())
    return found


def _is_unfit(judge: str) -> bool:
    try:
        guard_paths(judge)
        asks_the_network(judge)
    except BadGuard:
        return True
    return False


def _made(states: str) -> list[Path]:
    if not states:
        return []
    Path(states).mkdir(parents=True, exist_ok=True)
    return [Path(states).resolve()]


def _progress(scratch: Path, *, parity: bool) -> Iterator[Progress]:
    from finetuning.stages import pipeline  # torch takes seconds to import; the watch on stdin must stand before that

    return pipeline.certify(scratch) if parity else pipeline.run(read_order(scratch), scratch)


def _claim_stdout() -> TextIO:
    """Keep the real standard output for Progress lines and send every stray print to standard error."""
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return os.fdopen(kept, "w", encoding="utf-8")


def _stop(_signal: int, _frame: FrameType | None) -> None:
    os._exit(STOPPED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

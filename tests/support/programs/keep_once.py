"""Makes a folder of two files once, the second one when told to by a line on standard input; prints what it does."""

import os
import sys
from pathlib import Path

from finetuning.contract.keep_once import keep_once


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def make(scratch: Path) -> Path:
    folder = scratch / "made"
    folder.mkdir()
    (folder / "first").write_text(str(os.getpid()))
    say("making")
    sys.stdin.readline()
    (folder / "second").write_text(str(os.getpid()))
    return folder


keep_once(Path(sys.argv[1]), make, say=say)
say("done")

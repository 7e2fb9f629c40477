"""The command `immunotune VERB ...`: prepares the environment, then becomes the verb's own program.

No package of ours is imported before the verb is known, so that a list of verbs, a wrong word or a missing extra is
answered at once, and so that settings for torch and for the model hub stand before those read them.
"""

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path

from immunotune.verbs import MODULES, VERBS, advice, environment_of, missing, usage

Program = Callable[[list[str]], int]


def main(arguments: list[str] | None = None) -> int:
    """Run one verb in this process, which is then the one to signal; its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] not in VERBS:
        sys.stdout.write(usage("immunotune", {verb: VERBS[verb].line for verb in VERBS}) + "\n")
        return 0 if not words or words[0] in ("-h", "--help", "help") else 2
    verb, rest = words[0], words[1:]
    lacking = missing(VERBS[verb].needs, is_installed)
    if lacking:
        return _refuse(advice(verb, lacking))
    _prepare(verb)
    try:
        return _program(verb)(rest)
    except ModuleNotFoundError as error:
        extras = [extra for extra in VERBS[verb].may_need if error.name in MODULES[extra]]
        if not extras:
            raise
        return _refuse(advice(verb, extras))


def is_installed(module: str) -> bool:
    """Whether a top-level module can be imported; does not import it."""
    return find_spec(module) is not None


def data_home() -> Path:
    """Where everything is kept unless IMMUNOTUNE_DATA says otherwise.

    One place a user, not the current folder: bases, keys and jobs are then found again from anywhere.
    """
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "immunotune"


def _prepare(verb: str) -> None:
    for name, value in environment_of(verb).items():
        os.environ.setdefault(name, value)
    if "IMMUNOTUNE_DATA" not in os.environ:
        os.environ["IMMUNOTUNE_DATA"] = str(data_home())
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # for us PYTHONUNBUFFERED comes too late


def _program(verb: str) -> Program:
    """What serves a verb; importing it may take seconds."""
    if verb in ("demo", "align"):
        from demo.__main__ import main as demo

        return demo if verb == "demo" else lambda rest: demo(["--align-only", *rest])
    if verb == "bench":
        from app.core.settings import load_settings
        from finetuning.bench.run import main as bench

        return lambda rest: bench(rest, load_settings().data)
    if verb == "rows":
        from finetuning.rows_builder.command import main as rows

        return rows
    from embedded.__main__ import main as embedded

    return lambda rest: embedded([verb, *rest])


def _refuse(why: str) -> int:
    sys.stderr.write(why + "\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())

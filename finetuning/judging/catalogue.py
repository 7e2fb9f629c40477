"""Judges by name: those by rules, the guards whose files ship here, and an operator's own guard files by path.

Must not import torch: settings are checked here long before a guard is opened (guards.py).
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from finetuning.judging.guard_file import GuardFile, load_guard_file
from finetuning.judging.judges import RULES, BadGuard

_FOLDER = Path(__file__).with_name("guard_files")
_ENDING = ".toml"


@cache
def shipped() -> Mapping[str, Path]:
    """The guard files that come with this package, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob(f"*{_ENDING}"))}


def parts_of(name: str) -> list[str]:
    """The judges that a name joins by "+", each known and each guard file sound. Raises BadGuard."""
    parts = name.split("+")
    for part in parts:
        if part not in RULES:
            guard_of(part)
    return parts


def guard_of(part: str) -> GuardFile:
    """The guard of one part of a name. Raises BadGuard."""
    return load_guard_file(_path(part))


def resolved(name: str) -> str:
    """The same name with whole paths, so that a process in another folder finds the same files. Raises BadGuard."""
    return "+".join(str(_path(part)) if _is_path(part) else part for part in parts_of(name))


def label_of(part: str) -> str:
    """What reports call one part: a path becomes its file's name and the beginning of its digest.

    Two files of one name are two judges, and where a file lies is nobody's business. Raises BadGuard.
    """
    if not _is_path(part):
        return part
    path = _path(part)
    try:
        return f"{path.stem}@{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
    except OSError as error:
        raise BadGuard(f"guard file {path} cannot be read ({error.strerror}); correct the path") from error


def label(name: str) -> str:
    """What a whole name stands for in reports and fingerprints. Raises BadGuard."""
    return "+".join(map(label_of, name.split("+")))


def key_variables(name: str) -> tuple[str, ...]:
    """The environment variables that hold the keys of a name's guards. Raises BadGuard."""
    guards = [guard_of(part) for part in name.split("+") if part not in RULES] if name else []
    return tuple(guard.url.key_variable for guard in guards if guard.url is not None and guard.url.key_variable)


def asks_the_network(name: str) -> bool:
    """Whether one of a name's guards is behind a URL. Raises BadGuard."""
    return any(guard_of(part).url is not None for part in name.split("+") if part and part not in RULES)


def guard_paths(name: str) -> tuple[Path, ...]:
    """The guard files that a name's parts stand for. Raises BadGuard."""
    return tuple(_path(part) for part in name.split("+") if part and part not in RULES)


def require_keys(name: str, environment: Mapping[str, str]) -> None:
    """Raises BadGuard for a guard whose key variable is not set."""
    for variable in key_variables(name):
        if not environment.get(variable):
            raise BadGuard(f"the guard's field url.key_variable names {variable}, which is not set; export it")


def _is_path(part: str) -> bool:
    return part.endswith(_ENDING)


def _path(part: str) -> Path:
    if _is_path(part):
        path = Path(part).expanduser().resolve()
        if "+" in str(path):
            raise BadGuard(
                f"judge {path} has a + in its path, and + joins judges; move the guard file to a path without it"
            )
        return path
    if "/" in part:  # the beginning of a path that was split
        raise BadGuard(
            f"judge {part} is no path of a *{_ENDING}, and + joins judges; move the guard file to a path without it"
        )
    if part not in shipped():
        known = ", ".join([*RULES, *shipped()])
        raise BadGuard(
            f"judge {part or '(no name)'} is unknown; use one of {known}, or the path of a guard file "
            f"(*{_ENDING}), joined by +"
        )
    return shipped()[part]

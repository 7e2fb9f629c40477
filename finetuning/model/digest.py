"""What a base's weights are, in one digest: results, kept states and alignments belong to it, not to a folder's name.

Must not import torch: whoever writes an order asks here.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ABOUT_FILE = "alignment.json"  # beside an alignment's adapter; beside a fine-tune's lies its parity certificate
PARITY_FILE = "parity.json"
UNBOUND = (
    "The alignment does not say over which files of its base it was made (an earlier release's does not), so that "
    "could not be checked; align the base again to have it checked"
)
_SMALL = (".json", ".jinja", ".model", ".txt")
_WEIGHTS, _FILES = "base_sha256", "base_files_sha256"


class OtherBase(ValueError):
    """An adapter was made over other files of its base than those that are loaded; the message says what to do."""


@dataclass(frozen=True)
class BaseFiles:
    """The digests of a base, of its weights and of all its files; empty for one that is no folder of this machine."""

    weights: str = ""
    files: str = ""

    def told(self) -> dict[str, str]:
        """What is written beside an adapter that is made over this base."""
        return {_WEIGHTS: self.weights, _FILES: self.files}


def base_files(source: str | Path, weights: str = "") -> BaseFiles:
    """The digests of the base that lies in this folder; `weights` where they are known saves making them."""
    known = weights or weights_digest(Path(source))
    return BaseFiles(known, files_digest(Path(source), known))


def require_same_base(folder: Path, base: BaseFiles) -> bool:
    """Whether the adapter in `folder` says over which files of its base it was made; earlier releases' do not.

    Raises OtherBase where it was made over others than `base`.
    """
    found = _said_of_its_base(folder)
    pairs = [(found.get(name, ""), own) for name, own in base.told().items()]
    if any(made_over and own and made_over != own for made_over, own in pairs):
        raise OtherBase(
            f"the adapter was made over other files of its base (sha256 {_short(pairs, 0)}) than those that are loaded "
            f"({_short(pairs, 1)}): put the base's files back as they were, or align the base again in a new data "
            "folder and train over that"
        )
    return any(made_over for made_over, _ in pairs)


def _said_of_its_base(folder: Path) -> Mapping[str, str]:
    for name in (ABOUT_FILE, PARITY_FILE):
        if (folder / name).is_file():
            said = json.loads((folder / name).read_text(encoding="utf-8"))
            return {key: said[key] for key in (_WEIGHTS, _FILES) if isinstance(said.get(key), str)}
    return {}


def _short(pairs: list[tuple[str, str]], side: int) -> str:
    """The first digest in which the two sides differ, cut as people compare them."""
    return next(pair[side][:12] for pair in pairs if all(pair) and pair[0] != pair[1])


def weights_digest(folder: Path) -> str:
    """The sha256 of a base's weights: of the one file, or of its shards' digests; empty for a hub id."""
    shards = sorted(folder.glob("*.safetensors"))
    digests = [_file_digest(path, path.stat().st_mtime_ns) for path in shards]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else ""


def files_digest(folder: Path, weights: str) -> str:
    """The sha256 of all that decides what a base answers: weights (their digest, which takes seconds to make and is
    known to whoever wrote the order), configuration, tokenizer and template; empty where the weights are not known."""
    small = sorted(path for path in folder.glob("*") if path.suffix in _SMALL)
    parts = [f"{path.name} {_file_digest(path, path.stat().st_mtime_ns)}" for path in small]
    return hashlib.sha256("\n".join([weights, *parts]).encode()).hexdigest() if weights else ""


@lru_cache(maxsize=64)
def _file_digest(path: Path, _changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

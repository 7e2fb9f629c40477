"""What a base's weights are, in one digest: results, kept states and alignments belong to it, not to a folder's name.

Must not import torch: whoever writes an order asks here.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

_SMALL = (".json", ".jinja", ".model", ".txt")


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

"""Hidden states that enter the first trained layer, computed once per row and reused by every stage.

When only the top N layers are trained, these states are a pure function of the row's ids. They are kept in one memory-
mapped file, keyed by the hash of the ids and bounded in size; beyond the bound rows are computed anew. Those of the
operator's own rows outlive the job (state_store.py).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetuning.model.base import FrozenBase, body, last_hidden
from finetuning.model.hidden_states import caught_outputs, first_tensor
from finetuning.model.state_store import KeptStates

Ids = tuple[int, ...]
# Lengths are multiples of _LENGTH_STEP, and about so many tokens are computed together: on a CPU few rows are as fast
# as many, and a group that is filled up costs as much as a full one. A GPU wants more at once.
_LENGTH_STEP = 8
_TOKENS_ON_CPU, _TOKENS_ON_ACCELERATORS = 192, 8192
_MOST_TOGETHER = 8


class _Shape:
    """Whether this model's layers return a tuple; learnt from the layers that really run."""

    as_tuple = False


class _Pass(nn.Module):
    """Stands for a layer that is passed over: hands on `states`, or else its input."""

    def __init__(self, shape: _Shape, states: Tensor | None = None) -> None:
        super().__init__()
        self._shape = shape
        self._states = states

    def forward(self, hidden_states: Any, *_args: Any, **_kwargs: Any) -> Any:
        hidden = first_tensor(hidden_states) if self._states is None else self._states
        return (hidden,) if self._shape.as_tuple else hidden


@contextmanager
def _replaced(layers: nn.ModuleList, start: int, others: Sequence[nn.Module]) -> Iterator[None]:
    originals = [layers[start + i] for i in range(len(others))]
    for i, other in enumerate(others):
        layers[start + i] = other
    try:
        yield
    finally:
        for i, original in enumerate(originals):
            layers[start + i] = original


@contextmanager
def passing_above(base: FrozenBase, cut: int, shape: _Shape | None = None) -> Iterator[None]:
    """While open, only the layers below `cut` run; those above are passed over."""
    shape = shape or _Shape()

    def learn(_module: nn.Module, _inputs: Any, output: Any) -> None:
        shape.as_tuple = isinstance(output, tuple)

    handle = base.layers[cut - 1].register_forward_hook(learn)
    try:
        with _replaced(base.layers, cut, [_Pass(shape) for _ in range(len(base.layers) - cut)]):
            yield
    finally:
        handle.remove()


class PrefixCache:
    """States below layer `first_trained` of `base`; a cut of 0 caches nothing and runs the whole model."""

    def __init__(
        self,
        base: FrozenBase,
        first_trained: int,
        *,
        folder: Path | None = None,
        max_bytes: int = 1 << 30,
        kept: KeptStates | None = None,
    ) -> None:
        self._base = base
        self._cut = first_trained
        self._kept = kept
        self._shared: set[bytes] = set()
        self._places: dict[bytes, tuple[int, int]] = {}
        self._used = 0
        self._rows = max_bytes // (4 * base.hidden_size)
        self._store = self._open(folder)
        self._shape = _Shape()

    @property
    def cut(self) -> int:
        """Index of the first trained layer."""
        return self._cut

    def hidden(self, rows: Sequence[Ids]) -> Tensor:
        """Last hidden states (B, T, D) of right-padded rows, T the longest; gradients reach the trained layers."""
        ids = pad(rows, self._base.device)
        if self._cut == 0:
            return last_hidden(self._base.model, input_ids=ids, use_cache=False)
        states = self.states(rows)
        with self.injected(states):
            return last_hidden(self._base.model, input_ids=ids, use_cache=False)

    def states(self, rows: Sequence[Ids]) -> Tensor:
        """States entering the first trained layer (B, T, D), zeros at padding."""
        fresh = self._fill(rows)
        longest = max(len(row) for row in rows)
        out = torch.zeros(len(rows), longest, self._base.hidden_size, device=self._base.device)
        for i, row in enumerate(rows):
            name = key(row)
            found = fresh[name] if name in fresh else self._find(name)
            out[i, : len(row)] = found.to(out.device)
        return out

    def prepare(self, rows: Sequence[Ids]) -> None:
        """Compute and keep the states of rows that are not kept yet; a row's bits do not depend on the others."""
        if self._cut and self._used < self._rows:
            self._fill(rows)

    def share(self, rows: Sequence[Ids]) -> None:
        """These rows are the operator's: `leave` may keep their states for later jobs."""
        if self._kept is not None:
            self._shared.update(map(key, rows))

    def leave(self) -> None:
        """Keep the states of the operator's rows that this job computed."""
        if self._kept is not None:
            self._kept.add({name: self._find(name) for name in self._shared & self._places.keys()})

    def _knows(self, name: bytes) -> bool:
        return name in self._places or (self._kept is not None and name in self._kept)

    def _find(self, name: bytes) -> Tensor:
        place = self._places.get(name)
        if place is not None:
            return self._read(place)
        assert self._kept is not None
        return self._kept[name]

    def _fill(self, rows: Sequence[Ids]) -> dict[bytes, Tensor]:
        """Compute what is missing; returns the states for which the file has no room left."""
        missing = list({key(row): row for row in rows if not self._knows(key(row))}.values())
        unkept: dict[bytes, Tensor] = {}
        for group in _groups(missing, self._together):
            for row, state in zip(group, self._compute(group), strict=True):
                self._keep(row, state)
                if key(row) not in self._places:
                    unkept[key(row)] = state
        return unkept

    @contextmanager
    def injected(self, states: Tensor) -> Iterator[None]:
        """While open, layers below the cut are skipped and the first trained layer receives `states`."""
        passes = [_Pass(self._shape) for _ in range(self._cut - 1)] + [_Pass(self._shape, states)]
        with _replaced(self._base.layers, 0, passes):
            yield

    @torch.no_grad()
    def _compute(self, rows: Sequence[Ids]) -> list[Tensor]:
        """Run the layers below the cut on some rows of one length class; (T, D) each.

        A matrix product's last bits depend on its shape, so each length class has one shape: the group is filled up,
        the length rounded up. A row's states then never depend on which rows were computed with it, before a kill or
        after.
        """
        length = _length_class(rows[0])
        full = [*rows, *[rows[0]] * (self._together(length) - len(rows))]
        ids = pad(full, self._base.device, length=length)
        with (
            passing_above(self._base, self._cut, self._shape),
            caught_outputs(self._base.layers[self._cut - 1]) as kept,
        ):
            body(self._base.model)(input_ids=ids, use_cache=False)
        return [kept[0][i, : len(row)] for i, row in enumerate(rows)]

    def _together(self, length: int) -> int:
        """How many rows of this length class are computed at once."""
        tokens = _TOKENS_ON_CPU if self._base.device.type == "cpu" else _TOKENS_ON_ACCELERATORS
        return max(1, min(_MOST_TOGETHER, tokens // length))

    def _open(self, folder: Path | None) -> np.memmap[Any, Any] | np.ndarray[Any, Any] | None:
        if self._cut == 0:
            return None
        if folder is None:
            return np.empty((0, self._base.hidden_size), dtype=np.float32)
        folder.mkdir(parents=True, exist_ok=True)
        shape = (self._rows, self._base.hidden_size)
        # w+ makes a sparse file: only pages that are written take room on the disk.
        return np.memmap(folder / "prefix-states.f32", dtype=np.float32, mode="w+", shape=shape)

    def _keep(self, row: Ids, state: Tensor) -> None:
        if self._store is None or self._used + len(row) > self._rows:
            return
        if not isinstance(self._store, np.memmap) and self._used + len(row) > len(self._store):
            grown = np.empty((max(1024, 2 * len(self._store), self._used + len(row)), self._store.shape[1]), np.float32)
            grown[: self._used] = self._store[: self._used]
            self._store = grown
        self._store[self._used : self._used + len(row)] = state.cpu().numpy()
        self._places[key(row)] = (self._used, len(row))
        self._used += len(row)

    def _read(self, place: tuple[int, int]) -> Tensor:
        assert self._store is not None
        start, length = place
        return torch.from_numpy(np.array(self._store[start : start + length]))


def key(row: Ids) -> bytes:
    """The name of a row in the cache: a hash of its ids."""
    return hashlib.blake2b(np.asarray(row, dtype=np.int64).tobytes(), digest_size=16).digest()


def pad(rows: Sequence[Ids], device: torch.device, *, length: int = 0) -> Tensor:
    """Right-padded ids (B, T). Padding is id 0 by position: a causal model never looks at it from a real token."""
    out = torch.zeros(len(rows), max(length, *map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out.to(device)


def _length_class(row: Ids) -> int:
    return -(-len(row) // _LENGTH_STEP) * _LENGTH_STEP


def _groups(rows: Sequence[Ids], together: Callable[[int], int]) -> Iterator[list[Ids]]:
    """Groups of rows of one length class, at most `together` of it, in order of first appearance."""
    waiting: dict[int, list[Ids]] = {}
    for row in rows:
        length = _length_class(row)
        group = waiting.setdefault(length, [])
        group.append(row)
        if len(group) == together(length):
            yield waiting.pop(length)
    yield from waiting.values()

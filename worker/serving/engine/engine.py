"""One thread that answers prompts: it gathers requests, decodes rows with different adapters in one batch, and lets go.

Knows asks, rows and their order; must not know HTTP, blobs or the wire. Greedy answers do not depend on the batch.
"""

import queue
import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import structlog
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from finetuning.model.base import FrozenBase
from worker.serving.engine.decoding import NO_ADAPTER, AdapterMismatch, AdapterModel, DecodeBatch, Prefill
from worker.serving.engine.sampling import Drawn, Sampling, TokenLogprob, draw
from worker.serving.engine.text import CompletionText

log = structlog.get_logger()


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of one engine. `cached_tokens` counts rows times their longest possible length, padding included."""

    rows: int = 16
    cached_tokens: int = 32_768
    waiting: int = 64
    adapters: int = 8
    prefill_tokens: int = 256


@dataclass(frozen=True)
class Adapter:
    """A peft folder and the name under which it is attached."""

    name: str
    folder: Path


@dataclass(frozen=True)
class Piece:
    """Text of one choice that may be shown, and the logprobs of the tokens behind it."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Ended:
    """A choice is complete; `tokens` were drawn for it, the end-of-answer token included."""

    choice: int
    reason: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True)
class Broken:
    """The engine could not go on with this ask; nothing more follows."""


EngineEvent = Piece | Ended | Broken


@dataclass(frozen=True)
class Ask:
    """One request. `deliver` is called on the engine's thread and returns at once; anyone may set `cancelled`."""

    prompt: tuple[int, ...]
    adapter: Adapter | None
    sampling: Sampling
    new_tokens: int
    deliver: Callable[[EngineEvent], None]
    choices: int = 1
    stops: tuple[str, ...] = ()
    seed: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def longest(self) -> int:
        """Positions that one choice may come to fill."""
        return len(self.prompt) + self.new_tokens


class EngineFull(Exception):
    """Too many asks are waiting; nothing was done."""


class Engine:
    """Start it, attach adapters, submit asks; `close` ends its thread and breaks what is left."""

    def __init__(self, base: FrozenBase, limits: EngineLimits) -> None:
        self._limits = limits
        self._model = AdapterModel(base.model, capacity=limits.adapters)
        self._tokenizer: PreTrainedTokenizerBase = base.tokenizer
        self._ends = base.end_ids
        self._inbox: queue.SimpleQueue[Ask | _Attach | None] = queue.SimpleQueue()
        self._waiting: deque[_Group] = deque()
        self._rows: list[_Row] = []
        self._batch = DecodeBatch()
        self.open_asks = 0
        """Asks taken and not yet ended."""
        self._counting = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread. Call once."""
        self._thread.start()

    @property
    def has_room(self) -> bool:
        """Whether an ask would be taken now."""
        return not self._closed and self.open_asks < self._limits.waiting + self._limits.rows

    @property
    def attached(self) -> tuple[str, ...]:
        """Names of the adapters in memory, least recently used first."""
        return self._model.names

    def attach(self, adapter: Adapter) -> Future[None]:
        """Load an adapter between two steps; the future raises AdapterMismatch if it does not fit."""
        request = _Attach(adapter)
        self._inbox.put(request)
        return request.done

    def submit(self, ask: Ask) -> None:
        """Queue an ask; events follow through `ask.deliver`. Raises EngineFull."""
        with self._counting:
            if not self.has_room:
                raise EngineFull
            self.open_asks += 1
        self._inbox.put(ask)

    def close(self, *, timeout_seconds: float = 10.0) -> None:
        """Stop after the current step."""
        self._closed = True
        self._inbox.put(None)
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while self._take_requests():
            try:
                self._drop_cancelled()
                self._prefill()
                self._step()
            except Exception:  # the request rim: one bad batch must not end the server
                log.exception("engine.step_failed", rows=len(self._rows))
                self._break_all()
        self._break_all()

    def _take_requests(self) -> bool:
        """Move what arrived into the line; wait for something when there is nothing to do. False: closed."""
        idle = not self._rows and not self._waiting
        while True:
            try:
                request = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            idle = False
            if request is None:
                return False
            if isinstance(request, _Attach):
                self._attach(request)
            else:
                self._waiting.append(_Group(request))

    def _attach(self, request: "_Attach") -> None:
        try:
            self._model.attach(request.adapter.name, request.adapter.folder, in_use=self._adapters_in_use())
            request.done.set_result(None)
        except Exception as problem:  # noqa: BLE001 - the request rim: whoever waits for the future gets it
            request.done.set_exception(problem)

    def _drop_cancelled(self) -> None:
        for group in [group for group in self._waiting if group.ask.cancelled.is_set()]:
            self._waiting.remove(group)
            self._let_go()
        if any(row.group.ask.cancelled.is_set() for row in self._rows):
            for row in self._rows:
                row.over = row.over or row.group.ask.cancelled.is_set()
            self._leave()

    def _prefill(self) -> None:
        """Advance the first waiting prompt by one piece; when it is through, its rows join the batch."""
        if not self._waiting or not self._fits(self._waiting[0].ask):
            return
        group = self._waiting[0]
        prefill = group.prefill = group.prefill or self._begin(group)
        if prefill is None:
            return
        logits = prefill.advance(self._model, tokens=self._limits.prefill_tokens)
        if logits is None:
            return
        self._waiting.popleft()
        rows = [_Row(group, choice, self._tokenizer) for choice in range(group.ask.choices)]
        self._batch.join(prefill, copies=len(rows))
        self._rows += rows
        for row in rows:
            self._advance(row, logits)
        self._leave()

    def _step(self) -> None:
        if self._rows:
            logits_by_row = self._batch.step(self._model, [row.last for row in self._rows])
            for row, logits in zip(self._rows, logits_by_row, strict=True):
                self._advance(row, logits)
            self._leave()

    def _advance(self, row: "_Row", logits: Tensor) -> None:
        ask = row.group.ask
        drawn = draw(logits, ask.sampling, row.counts, row.generator)
        if drawn.token in self._ends:
            self._end(row, "stop", row.text.finish(), extra_tokens=1)
            return
        piece = row.take(drawn)
        if row.text.stopped:
            self._end(row, "stop", piece)
        elif row.tokens == ask.new_tokens:
            self._end(row, "length", piece + row.text.finish())
        elif piece:
            ask.deliver(Piece(row.choice, piece, row.release_logprobs()))

    def _end(self, row: "_Row", reason: Literal["stop", "length"], text: str, *, extra_tokens: int = 0) -> None:
        row.over = True
        logprobs = row.release_logprobs()
        if text or logprobs:
            row.group.ask.deliver(Piece(row.choice, text, logprobs))
        row.group.ask.deliver(Ended(row.choice, reason, row.tokens + extra_tokens))

    def _leave(self) -> None:
        kept = [at for at, row in enumerate(self._rows) if not row.over]
        if len(kept) == len(self._rows):
            return
        before = {id(row.group) for row in self._rows}
        self._rows = [self._rows[at] for at in kept]
        self._batch.keep(kept)
        for _ in before - {id(row.group) for row in self._rows}:
            self._let_go()

    def _let_go(self) -> None:
        with self._counting:
            self.open_asks -= 1

    def _fits(self, ask: Ask) -> bool:
        rows = len(self._rows) + ask.choices
        longest = max([ask.longest, *(row.group.ask.longest for row in self._rows)])
        fits = rows <= self._limits.rows and rows * longest <= self._limits.cached_tokens
        return fits or not self._rows  # alone, anything that the context allows may run

    def _begin(self, group: "_Group") -> Prefill | None:
        adapter = group.ask.adapter
        if adapter is None:
            return Prefill(group.ask.prompt, NO_ADAPTER)
        try:  # it was attached before the ask came, but may have had to leave again since
            self._model.attach(adapter.name, adapter.folder, in_use=self._adapters_in_use())
        except (AdapterMismatch, OSError):
            log.exception("engine.adapter_lost", adapter=adapter.name)
            self._waiting.popleft()
            self._let_go()
            group.ask.deliver(Broken())
            return None
        return Prefill(group.ask.prompt, adapter.name)

    def _adapters_in_use(self) -> frozenset[str]:
        begun = [group.prefill.adapter for group in self._waiting if group.prefill is not None]
        return frozenset([*self._batch.adapters, *begun])

    def _break_all(self) -> None:
        groups = {id(row.group): row.group for row in self._rows} | {id(group): group for group in self._waiting}
        self._rows, self._batch = [], DecodeBatch()
        self._waiting.clear()
        for group in groups.values():
            group.ask.deliver(Broken())
            self._let_go()


@dataclass(frozen=True)
class _Attach:
    adapter: Adapter
    done: Future[None] = field(default_factory=Future[None])


@dataclass
class _Group:
    """An ask on its way: its rows share one prefill."""

    ask: Ask
    prefill: Prefill | None = None


class _Row:
    """One choice being decoded."""

    def __init__(self, group: _Group, choice: int, tokenizer: PreTrainedTokenizerBase) -> None:
        ask = group.ask
        self.group = group
        self.choice = choice
        self.counts: Counter[int] = Counter()
        self.text = CompletionText(tokenizer, ask.stops)
        self.last = -1
        self.tokens = 0
        self.over = False
        seed = secrets.randbits(62) if ask.seed is None else ask.seed
        self.generator = torch.Generator().manual_seed((seed + choice * 0x9E3779B97F4A7C15) % 2**63)
        self._logprobs: list[tuple[int, TokenLogprob]] = []

    def take(self, drawn: Drawn) -> str:
        """Count the token in; return the text that may be shown."""
        self.last = drawn.token
        self.tokens += 1
        self.counts[drawn.token] += 1
        if drawn.logprob is not None:
            self._logprobs.append((self.text.length, drawn.logprob))
        return self.text.push(drawn.token)

    def release_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Logprobs not yet delivered; tokens that a stop string cut off whole are left out."""
        kept = [entry for start, entry in self._logprobs if not self.text.stopped or start < self.text.length]
        self._logprobs = []
        return tuple(kept)

"""One thread that answers prompts: it takes asks, decodes rows with different adapters in one batch, and delivers text.

Each turn it takes what arrived, drops what was cancelled, reads a piece of one waiting prompt, and draws one token for
every row. Greedy answers do not depend on who else is in the batch.
"""

import queue
import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import structlog
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from finetuning.model.base import FrozenBase
from worker.serving.engine.asks import Ask, Broken, Ended, EngineFull, EngineLimits, Piece, ServedAdapter
from worker.serving.engine.choices import ChoiceRow, OpenAsk
from worker.serving.engine.decoding import NO_ADAPTER, AdapterDoesNotFit, AdapterModel, DecodeBatch, Prefill
from worker.serving.engine.line import Line
from worker.serving.engine.sampling import draw

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Attach:
    """A wish to have an adapter in memory."""

    adapter: ServedAdapter
    done: Future[None] = field(default_factory=Future[None])


class Engine:
    """Start it, attach adapters, submit asks; `close` ends its thread and breaks what is left."""

    def __init__(self, base: FrozenBase, limits: EngineLimits) -> None:
        """An engine that answers nothing yet."""
        self._limits = limits
        self._model = AdapterModel(base.model, capacity=limits.adapters)
        self._tokenizer: PreTrainedTokenizerBase = base.tokenizer
        self._ends = base.end_ids
        self._inbox: queue.SimpleQueue[Ask | _Attach | None] = queue.SimpleQueue()
        self._waiting = Line()
        self._reading: OpenAsk | None = None
        """Whose prompt is being read."""
        self._rows: list[ChoiceRow] = []
        self._batch = DecodeBatch()
        self.open_asks = 0
        """Asks taken and not yet ended."""
        self._open_by_tenant: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- for everybody, on any thread ---

    def start(self) -> None:
        """Start the thread. Call once."""
        self._thread.start()

    def has_room(self, tenant: str = "") -> bool:
        """Whether an ask of this tenant would be taken now."""
        own = self._open_by_tenant[tenant]
        return not self._closed and self.open_asks < self._limits.asks and own < self._limits.asks_of_a_tenant

    @property
    def attached(self) -> tuple[str, ...]:
        """Names of the adapters in memory, least recently used first."""
        return self._model.names

    def attach(self, adapter: ServedAdapter) -> Future[None]:
        """Load an adapter between two steps; the future raises AdapterDoesNotFit if it does not fit."""
        request = _Attach(adapter)
        self._inbox.put(request)
        return request.done

    def submit(self, ask: Ask) -> None:
        """Queue an ask; events follow through `ask.deliver`. Raises EngineFull."""
        with self._counting:
            if not self.has_room(ask.tenant):
                raise EngineFull
            self.open_asks += 1
            self._open_by_tenant[ask.tenant] += 1
        self._inbox.put(ask)

    def close(self, *, timeout_seconds: float = 10.0) -> None:
        """Stop after the current step."""
        self._closed = True
        self._inbox.put(None)
        self._thread.join(timeout_seconds)

    # --- the engine's own thread, in the order of one turn ---

    def _run(self) -> None:
        while self._take_requests():
            try:
                self._drop_cancelled()
                self._prefill()
                self._step()
            except Exception:  # noqa: BLE001 - the request rim: one bad batch must not end the server
                _log.exception("engine.step_failed", rows=len(self._rows))
                self._break_all()
        self._break_all()

    def _take_requests(self) -> bool:
        """Move what arrived into the line; wait for something when there is nothing to do. False: closed."""
        idle = not self._rows and not self._waiting and self._reading is None
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
                self._waiting.add(OpenAsk(request))

    def _attach(self, request: _Attach) -> None:
        try:
            self._load(request.adapter)
            request.done.set_result(None)
        except Exception as problem:  # noqa: BLE001 - the request rim: whoever waits for the future gets it
            request.done.set_exception(problem)

    def _load(self, adapter: ServedAdapter) -> None:
        begun = [self._reading.prefill.adapter] if self._reading is not None and self._reading.prefill else []
        self._model.attach(adapter.name, adapter.folder, in_use=frozenset([*self._batch.adapters, *begun]))

    def _drop_cancelled(self) -> None:
        for cancelled in [waiting for waiting in self._waiting if waiting.is_cancelled]:
            self._waiting.remove(cancelled)
            self._count_out(cancelled)
        if self._reading is not None and self._reading.is_cancelled:
            self._count_out(self._reading)
            self._reading = None
        if any(row.open_ask.is_cancelled for row in self._rows):
            for row in self._rows:
                row.is_done = row.is_done or row.open_ask.is_cancelled
            self._drop_done()

    def _prefill(self) -> None:
        """Advance the prompt whose turn it is by one piece; when it is through, its rows join the batch."""
        first = self._reading = self._reading or self._waiting.take(self._fits)
        if first is None:
            return
        prefill = first.prefill = first.prefill or self._begin(first)
        if prefill is None:
            return
        logits = prefill.advance(self._model, tokens=self._limits.prefill_tokens)
        if logits is None:
            return
        rows = [ChoiceRow(first, choice, self._tokenizer) for choice in range(first.ask.choices)]
        self._batch.join(prefill, copies=len(rows))
        self._rows += rows
        self._reading = None
        for row in rows:
            self._advance(row, logits)
        self._drop_done()

    def _fits(self, ask: Ask) -> bool:
        rows = len(self._rows) + ask.choices
        longest = max([ask.longest, *(row.open_ask.ask.longest for row in self._rows)])
        fits = rows <= self._limits.rows and rows * longest <= self._limits.cached_tokens
        return fits or not self._rows  # alone, what `completions.prepare` lets in may run

    def _begin(self, first: OpenAsk) -> Prefill | None:
        adapter = first.ask.adapter
        if adapter is None:
            return Prefill(first.ask.prompt, NO_ADAPTER)
        try:  # it was attached before the ask came, but may have had to leave again since
            self._load(adapter)
        except (AdapterDoesNotFit, OSError):
            _log.exception("engine.adapter_lost", adapter=adapter.name)
            self._reading = None
            self._count_out(first)
            first.ask.deliver(Broken())
            return None
        return Prefill(first.ask.prompt, adapter.name)

    def _step(self) -> None:
        if self._rows:
            logits_by_row = self._batch.step(self._model, [row.last for row in self._rows])
            for row, logits in zip(self._rows, logits_by_row, strict=True):
                self._advance(row, logits)
            self._drop_done()

    def _advance(self, row: ChoiceRow, logits: Tensor) -> None:
        """Take a row one token further; a row that cannot go on ends its own ask and nobody else's."""
        if row.is_done:
            return  # another choice of its ask broke in this very step
        try:
            self._take(row, logits)
        except Exception:  # noqa: BLE001 - the request rim: one customer's row must not end another's answer
            adapter = row.open_ask.ask.adapter
            _log.exception("engine.row_failed", adapter=adapter and adapter.name)
            for other in self._rows:
                other.is_done = other.is_done or other.open_ask is row.open_ask
            row.open_ask.ask.deliver(Broken())

    def _take(self, row: ChoiceRow, logits: Tensor) -> None:
        """Draw a row's next token and deliver what may be shown of it."""
        ask = row.open_ask.ask
        drawn = draw(logits, ask.sampling, row.counts, row.generator)
        if drawn.token in self._ends:
            _end(row, "stop", row.text.finish(), extra_tokens=1)
            return
        piece = row.take(drawn)
        if row.text.stopped:
            _end(row, "stop", piece)
        elif row.tokens == ask.new_tokens:
            _end(row, "length", piece + row.text.finish())
        elif piece:
            ask.deliver(Piece(row.choice, piece, row.release_logprobs()))

    def _drop_done(self) -> None:
        """Take rows that are done out of the batch; an ask without rows has ended."""
        kept = [at for at, row in enumerate(self._rows) if not row.is_done]
        if len(kept) == len(self._rows):
            return
        before = {id(row.open_ask): row.open_ask for row in self._rows}
        self._rows = [self._rows[at] for at in kept]
        self._batch.keep(kept)
        for gone in before.keys() - {id(row.open_ask) for row in self._rows}:
            self._count_out(before[gone])

    def _break_all(self) -> None:
        broken = {id(row.open_ask): row.open_ask for row in self._rows} | {id(ask): ask for ask in self._waiting}
        self._rows, self._batch = [], DecodeBatch()
        if self._reading is not None:
            broken[id(self._reading)] = self._reading
        self._reading = None
        self._waiting.clear()
        for open_ask in broken.values():
            open_ask.ask.deliver(Broken())
            self._count_out(open_ask)

    def _count_out(self, gone: OpenAsk) -> None:
        with self._counting:
            self.open_asks -= 1
            self._open_by_tenant[gone.ask.tenant] -= 1
            self._open_by_tenant += Counter()  # keeps no tenant that has none


def _end(row: ChoiceRow, reason: Literal["stop", "length"], text: str, *, extra_tokens: int = 0) -> None:
    row.is_done = True
    logprobs = row.release_logprobs()
    if text or logprobs:
        row.open_ask.ask.deliver(Piece(row.choice, text, logprobs))
    row.open_ask.ask.deliver(Ended(row.choice, reason, row.tokens + extra_tokens))

"""One answer from the engine's events to the wire: streamed piece by piece, or whole.

Knows the engine's asks and events, and the wire; must not know sockets or blobs. Everything that can be refused is
refused by `prepare`, before the first byte.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import structlog

from finetuning.model.base import FrozenBase
from finetuning.rows.chat_format import NoChatTemplate, render_prompt
from finetuning.rows.scanner import Message
from worker.serving import protocol
from worker.serving.engine.engine import Adapter, Ask, Broken, Ended, Engine, EngineEvent, EngineFull, Piece
from worker.serving.engine.sampling import Sampling
from worker.serving.engine.text import token_bytes
from worker.serving.protocol import ChatBody, Choice, Head

log = structlog.get_logger(__name__)


class Refused(Exception):
    """The request cannot be answered; `body` is the error envelope."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


class AnswerLost(Exception):
    """The engine broke off in the middle."""


@dataclass(frozen=True)
class Answer:
    """A prepared answer: its ask and the events that will come."""

    ask: Ask
    events: "asyncio.Queue[EngineEvent]"
    head: Head
    token_text: protocol.TokenText | None
    include_usage: bool


def prepare(base: FrozenBase, body: ChatBody, adapter: Adapter | None, *, default_new_tokens: int) -> Answer:
    """Turn a body into an ask. Raises Refused. Call on the event loop that will read the events."""
    prompt = _prompt(base, body)
    room = int(base.model.config.max_position_embeddings) - len(prompt)
    if room < 1:
        message = (
            f"The base's context is {room + len(prompt)} tokens, but the messages take {len(prompt)}. Shorten them."
        )
        raise Refused(400, protocol.error_json(message, "context_length_exceeded", param="messages"))
    events: asyncio.Queue[EngineEvent] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    ask = Ask(
        prompt=tuple(prompt),
        adapter=adapter,
        sampling=_sampling(base, body),
        new_tokens=min(body.max_tokens or default_new_tokens, room),
        deliver=lambda event: _hand_over(loop, events, event),
        choices=body.n,
        stops=tuple(body.stop),
        seed=body.seed,
    )
    fingerprint = "fp_" + (adapter.folder.name[:10] if adapter else "public")
    head = Head(f"chatcmpl-{secrets.token_hex(12)}", body.model, int(time.time()), fingerprint)
    usage = body.stream_options is not None and body.stream_options.include_usage
    return Answer(ask, events, head, _token_text(base) if body.logprobs else None, usage)


async def stream(engine: Engine, answer: Answer) -> AsyncGenerator[bytes]:
    """Submit and yield server-sent events up to [DONE], or up to an error event. Closing it stops the generation."""
    try:
        for index in range(answer.ask.choices):
            yield protocol.chunk(answer.head, index, {"role": "assistant", "content": ""})
        tokens = 0
        async for event in _events(engine, answer):
            if isinstance(event, Piece):
                logprobs = protocol.logprobs_json(event.logprobs, answer.token_text)
                yield protocol.chunk(answer.head, event.choice, {"content": event.text}, logprobs=logprobs)
            else:
                tokens += event.tokens
                yield protocol.chunk(answer.head, event.choice, {}, reason=event.reason)
        if answer.include_usage:
            yield protocol.usage_chunk(answer.head, protocol.usage_json(len(answer.ask.prompt), tokens))
        yield protocol.DONE
    except AnswerLost:
        yield protocol.event(protocol.LOST)
    except EngineFull:
        yield protocol.event(protocol.FULL)
    finally:
        answer.ask.cancelled.set()


async def collect(engine: Engine, answer: Answer) -> dict[str, Any]:
    """Submit and return the whole chat.completion. Raises AnswerLost. Cancelling it stops the generation."""
    choices = [Choice() for _ in range(answer.ask.choices)]
    tokens = 0
    try:
        async for event in _events(engine, answer):
            choice = choices[event.choice]
            if isinstance(event, Piece):
                choice.text += event.text
                choice.logprobs += event.logprobs
            else:
                choice.reason = event.reason
                tokens += event.tokens
    finally:
        answer.ask.cancelled.set()
    return protocol.completion(
        answer.head, choices, protocol.usage_json(len(answer.ask.prompt), tokens), answer.token_text
    )


async def _events(engine: Engine, answer: Answer) -> AsyncGenerator[Piece | Ended]:
    engine.submit(answer.ask)
    running = answer.ask.choices
    while running:
        event = await answer.events.get()
        if isinstance(event, Broken):
            raise AnswerLost
        running -= isinstance(event, Ended)
        yield event


def _hand_over(loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[EngineEvent]", event: EngineEvent) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)


def _prompt(base: FrozenBase, body: ChatBody) -> list[int]:
    messages = [Message(role=message.role, content=message.content, weight=0) for message in body.messages]
    try:
        return render_prompt(base.tokenizer, messages)
    except NoChatTemplate as problem:
        raise Refused(400, protocol.error_json(f"{problem}.", "invalid_message", param="messages")) from None


def _sampling(base: FrozenBase, body: ChatBody) -> Sampling:
    barred = _special_ids(base)
    for token in body.logit_bias:
        if token in barred or not 0 <= token < int(base.model.config.vocab_size):
            message = f"logit_bias: {token} is no ordinary token of this base."
            raise Refused(400, protocol.error_json(message, "invalid_value", param=f"logit_bias.{token}"))
    return Sampling(
        temperature=body.temperature,
        top_p=body.top_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def _special_ids(base: FrozenBase) -> frozenset[int]:
    added = {token: entry for token, entry in base.tokenizer.added_tokens_decoder.items() if entry.special}
    return frozenset([*base.tokenizer.all_special_ids, *added, *base.end_ids])


def _token_text(base: FrozenBase) -> Callable[[int], tuple[str, bytes]]:
    def text(token: int) -> tuple[str, bytes]:
        raw = token_bytes(base.tokenizer, token)
        return raw.decode("utf-8", errors="replace"), raw

    return text

"""One completion: from the request to an ask, and from the engine's events to a stream or one whole answer.

Everything that can be refused is refused by `prepare`, before the first byte.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from finetuning.model.base import FrozenBase
from finetuning.rows.chat_format import NoChatTemplate, render_prompt
from finetuning.rows.scanner import Message
from worker.serving import protocol
from worker.serving.engine import (
    Ask,
    Broken,
    Ended,
    Engine,
    EngineEvent,
    EngineFull,
    Piece,
    Sampling,
    ServedAdapter,
    token_bytes,
)
from worker.serving.protocol import CollectedChoice, CompletionBody, Head

_PIECE_CHARACTERS = 16_384


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


@dataclass(frozen=True)
class Prompt:
    """A body's prompt as token ids, and for how many more there is room."""

    ids: tuple[int, ...]
    room: int


def read_prompt(base: FrozenBase, body: CompletionBody, *, cached_tokens: int) -> Prompt:
    """Tokenise a body's messages, in work bounded by what the base can read. Raises Refused. Not for an event loop."""
    context = int(base.model.config.max_position_embeddings)
    most = min(context, cached_tokens // body.n)
    if _surely_longer(base, body, most):
        raise _too_long(context, most, body.n, f"more than {most}")
    ids = _prompt(base, body)
    if len(ids) >= most:
        raise _too_long(context, most, body.n, str(len(ids)))
    return Prompt(tuple(ids), most - len(ids))


def prepare(
    base: FrozenBase, body: CompletionBody, prompt: Prompt, *, adapter: ServedAdapter | None, default_new_tokens: int
) -> Answer:
    """Turn a body into an ask. Raises Refused. Call on the event loop that will read the events."""
    events: asyncio.Queue[EngineEvent] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    ask = Ask(
        prompt=prompt.ids,
        adapter=adapter,
        sampling=_sampling(base, body),
        new_tokens=min(body.max_tokens or default_new_tokens, prompt.room),
        deliver=lambda event: _hand_over(loop, events, event),
        choices=body.n,
        stops=tuple(body.stop),
        seed=body.seed,
        tenant=body.user,
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
    choices = [CollectedChoice() for _ in range(answer.ask.choices)]
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


def _surely_longer(base: FrozenBase, body: CompletionBody, most: int) -> bool:
    """Whether the contents are too long, from a beginning of them that is little longer than may be: a tokenizer
    needs seconds for megabytes. A cut can make two tokens of one, so each is forgiven one."""
    left = most
    for message in body.messages:
        for at in range(0, len(message.content), _PIECE_CHARACTERS):
            piece = message.content[at : at + _PIECE_CHARACTERS]
            left -= len(base.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]) - 1
            if left < 0:
                return True
    return False


def _too_long(context: int, most: int, choices: int, found: str) -> Refused:
    message = f"The base's context is {context} tokens, but the messages take {found}. Shorten them."
    if most < context:
        noun = "choice" if choices == 1 else "choices"
        message = (
            f"The messages take {found} tokens, and for {choices} {noun} this server holds {most} each, the answer "
            "included. Shorten them or ask for fewer choices."
        )
    return Refused(400, protocol.error_json(message, "context_length_exceeded", param="messages"))


def _prompt(base: FrozenBase, body: CompletionBody) -> list[int]:
    messages = [Message(role=message.role, content=message.content, weight=0) for message in body.messages]
    try:
        return render_prompt(base.tokenizer, messages)
    except NoChatTemplate as problem:
        raise Refused(400, protocol.error_json(f"{problem}.", "invalid_message", param="messages")) from None


def _sampling(base: FrozenBase, body: CompletionBody) -> Sampling:
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

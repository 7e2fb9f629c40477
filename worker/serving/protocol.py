"""The model server's part of OpenAI's chat API: request body, whole answers, stream chunks, errors.

The gateway has already judged every field for the client; here they are only typed.
Sources: the openai SDK's chat.completion and chat.completion.chunk types.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from worker.serving.engine import TokenLogprob

TokenText = Callable[[int], tuple[str, bytes]]
DONE = b"data: [DONE]\n\n"


class _Typed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ChatMessage(_Typed):
    """One turn, already flattened to text."""

    role: Literal["system", "user", "assistant"]
    content: str


class StreamOptions(_Typed):
    """Only what a model server needs."""

    include_usage: bool = False


class CompletionBody(_Typed):
    """A chat request; `model` is an adapter's served name."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=8)] = 1
    stop: Annotated[list[str], Field(max_length=4)] = []
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[int, float] = {}
    user: str = ""  # whose turn it is, by a name that the gateway chose


@dataclass(frozen=True)
class Head:
    """What all chunks of one answer share."""

    id: str
    model: str
    created: int
    fingerprint: str


@dataclass
class CollectedChoice:
    """One choice as it is put together."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    reason: Literal["stop", "length"] | None = None


def completion(
    head: Head, choices: Sequence[CollectedChoice], usage: Mapping[str, int], token_text: TokenText | None
) -> dict[str, Any]:
    """A whole chat.completion; `token_text` None leaves logprobs null."""
    listed = [
        {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": logprobs_json(choice.logprobs, token_text),
            "finish_reason": choice.reason,
        }
        for index, choice in enumerate(choices)
    ]
    return {"object": "chat.completion", **_head(head), "choices": listed, "usage": dict(usage)}


def chunk(
    head: Head,
    index: int,
    delta: Mapping[str, str],
    *,
    reason: str | None = None,
    logprobs: dict[str, Any] | None = None,
) -> bytes:
    """One stream event with one choice's delta."""
    choice = {"index": index, "delta": dict(delta), "logprobs": logprobs, "finish_reason": reason}
    return event({"object": "chat.completion.chunk", **_head(head), "choices": [choice]})


def usage_chunk(head: Head, usage: Mapping[str, int]) -> bytes:
    """The last event before [DONE] when the client asked for usage."""
    return event({"object": "chat.completion.chunk", **_head(head), "choices": [], "usage": dict(usage)})


def usage_json(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The usage object."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def logprobs_json(entries: Sequence[TokenLogprob], token_text: TokenText | None) -> dict[str, Any] | None:
    """The logprobs object of a choice or delta, or None when they were not asked for."""
    if token_text is None:
        return None

    def one(token: int, logprob: float) -> dict[str, Any]:
        text, raw = token_text(token)
        return {"token": text, "bytes": list(raw), "logprob": max(logprob, -9999.0)}

    content = [
        {**one(entry.token, entry.logprob), "top_logprobs": [one(*candidate) for candidate in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def error_json(
    message: str, code: str, *, kind: str = "invalid_request_error", param: str | None = None
) -> dict[str, Any]:
    """The error envelope."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event: a data line and nothing else. ASCII only, so no text can look like a line break."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode("ascii") + b"\n\n"


def _head(head: Head) -> dict[str, Any]:
    return {
        "id": head.id,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
    }


LOST = error_json("The answer was lost. Send the request again.", "model_server_lost", kind="server_error")
NOT_THE_GATEWAY = error_json(
    "Only the service's gateway may ask here.", "invalid_api_key", kind="invalid_request_error"
)
FULL = error_json("The model server is full. Retry in a few seconds.", "overloaded", kind="server_error")

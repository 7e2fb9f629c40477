"""The body of a chat request: each field honoured, ignored or refused by name; and what a model server gets of it.

A field that the SDK knows and we do not honour is an error, so that nobody believes it had an effect.
"""

import hashlib
from collections.abc import Callable
from typing import Annotated, Literal, Self, cast

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator
from pydantic import model_validator as check_model
from pydantic_core import PydanticCustomError

from app.api.schemas import RequestBody

MAX_MESSAGES = 2048
# each unknown one is a fault of its own to tell
MAX_MESSAGE_FIELDS = 10 * MAX_MESSAGES
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _fault(code: str, message: str) -> PydanticCustomError:
    # json_bodies reads the code behind the prefix; pydantic wants both as literals
    return PydanticCustomError(cast(Literal[""], f"code:{code}"), cast(Literal[""], message))


def _messages(value: object) -> object:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise _fault("invalid_message", f"must be an array of 1 to {MAX_MESSAGES} messages")
    if not all(isinstance(message, dict) for message in cast(list[object], value)):
        raise _fault("invalid_message", "every message must be an object with role and content")
    if sum(len(message) for message in cast(list[dict[str, object]], value)) > MAX_MESSAGE_FIELDS:
        raise _fault("invalid_message", "messages have role and content, and few other fields")
    return cast(object, value)


def _role(value: object) -> str:
    if value == "tool":
        raise _fault("tools_not_supported", "this base has no tools")
    if not isinstance(value, str) or value not in _ROLES:
        raise _fault("invalid_message", "must be system, developer, user or assistant")
    return _ROLES[value]


def _content(value: object) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _fault("invalid_message", "must be a string, or an array of text parts")
    return "\n".join(_text_part(part) for part in cast(list[object], value))


def _text_part(part: object) -> str:
    fields = cast(dict[str, object], part) if isinstance(part, dict) else {}
    text = fields.get("text")
    if fields.get("type") != "text":
        raise _fault("unsupported_content_part", 'only parts like {"type": "text", "text": "..."} are supported')
    if not isinstance(text, str):
        raise _fault("invalid_message", "text of a text part must be a string")
    return text


def _only(code: str, message: str, *accepted: object) -> Callable[[object], None]:
    """A field that may be null or one of `accepted`, which have no effect; anything else is a fault."""

    def check(value: object) -> None:
        if value is not None and not any(type(value) is type(one) and value == one for one in accepted):
            raise _fault(code, message)

    return check


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _biases(value: dict[str, float]) -> dict[str, float]:
    if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in value):
        raise ValueError("keys must be token ids")
    return value


_UNSUPPORTED = PlainValidator(_only("unsupported_parameter", "is not supported here; leave it out"))
_NO_TOOLS = PlainValidator(_only("tools_not_supported", "this base has no tools; leave it out", [], "none"))
_TEXT_ONLY = PlainValidator(_only("unsupported_parameter", "only text is supported", ["text"]))
_NOT_STORED = PlainValidator(_only("unsupported_parameter", "answers are not stored; leave it out", *(False,)))
_ONE_TIER = PlainValidator(_only("unsupported_parameter", "there is one service tier", "auto", "default"))
_PLAIN_TEXT = PlainValidator(
    _only("response_format_not_supported", "this base answers in plain text only", {"type": "text"})
)

Unsupported = Annotated[None, _UNSUPPORTED]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class MessageBody(RequestBody):
    """One turn, its content joined to one text; `name` is ignored."""

    role: Annotated[str, PlainValidator(_role)] = Field(default=cast(str, None), validate_default=True)
    content: Annotated[str, PlainValidator(_content)] = Field(default=cast(str, None), validate_default=True)
    name: str | None = None
    refusal: Unsupported = None
    audio: Unsupported = None
    annotations: Annotated[None, PlainValidator(_only("unsupported_parameter", "is not supported here", []))] = None
    function_call: Unsupported = None
    tool_calls: Annotated[None, _NO_TOOLS] = None
    tool_call_id: Annotated[None, _NO_TOOLS] = None


class StreamOptionsBody(RequestBody):
    """`include_obfuscation` has no effect."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatCompletionBody(RequestBody):
    """POST /v1/chat/completions. Null always means: left out."""

    model: str
    messages: Annotated[list[MessageBody], BeforeValidator(_messages)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stop: Annotated[list[StopText], Field(max_length=4), BeforeValidator(_one_or_many)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptionsBody | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=300), AfterValidator(_biases)] | None = None

    tools: Annotated[None, _NO_TOOLS] = None
    tool_choice: Annotated[None, _NO_TOOLS] = None
    parallel_tool_calls: Annotated[None, _NO_TOOLS] = None
    response_format: Annotated[None, _PLAIN_TEXT] = None

    user: object = None
    safety_identifier: object = None
    metadata: object = None
    prompt_cache_key: object = None
    prompt_cache_options: object = None
    prompt_cache_retention: object = None
    service_tier: Annotated[None, _ONE_TIER] = None
    store: Annotated[None, _NOT_STORED] = None

    modalities: Annotated[None, _TEXT_ONLY] = None
    audio: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    web_search_options: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None

    @check_model(mode="after")
    def _fields_agree(self) -> Self:
        limits = {self.max_completion_tokens, self.max_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


def to_model_server(body: ChatCompletionBody, served: str, project_id: str) -> dict[str, object]:
    """The same request for a model server; `served` names what answers. Projects take turns there, under names that
    say nothing of them."""
    asked: dict[str, object] = {
        "model": served,
        "user": hashlib.blake2b(project_id.encode(), digest_size=8).hexdigest(),
        "messages": [{"role": message.role, "content": message.content} for message in body.messages],
        "max_tokens": body.max_completion_tokens or body.max_tokens,
    }
    for name in _PASSED_ON:
        asked[name] = getattr(body, name)
    if body.stream and body.stream_options is not None:
        asked["stream_options"] = {"include_usage": bool(body.stream_options.include_usage)}
    return {name: value for name, value in asked.items() if value is not None}


_PASSED_ON = (
    "temperature",
    "top_p",
    "n",
    "stop",
    "seed",
    "stream",
    "logprobs",
    "top_logprobs",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)

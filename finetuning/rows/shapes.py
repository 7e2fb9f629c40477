"""The shape of one row: what a chat, completion or preference row must look like. Pure functions of parsed JSON."""

import re
from collections.abc import Collection
from itertools import islice
from typing import Final, Literal, NamedTuple, cast

from finetuning.rows.strict_json import Path, printable

Format = Literal["chat", "completion", "dpo"]

MIN_MESSAGES = 2
MAX_MESSAGES = 512
MAX_LIKE_PROBLEMS = 16  # one object or content lists at most so many alike: a hostile row must not grow the report
WARNINGS: Final = frozenset({"blank_line", "ignored_field", "special_token_text", "duplicate_row", "example_too_long"})

_ROW_KEYS: Final = frozenset({"messages", "tools", "parallel_tool_calls", "metadata"})
_MESSAGE_KEYS: Final = frozenset({"role", "content", "weight", "name", "tool_calls", "tool_call_id", "refusal"})
_PLAIN_KEYS: Final = frozenset({"role", "content"})
_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})
_DPO_KEYS: Final = frozenset({"input", "preferred_output", "non_preferred_output"})
_AFTER: Final[dict[str, tuple[str, ...]]] = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "calls": ("tool",),
    "tool": ("tool", "assistant"),
}
_SPECIAL: Final = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|mask)>|<(?:start|end)_of_turn>|<</?SYS>>|\[/?INST\]"
)


class Problem(NamedTuple):
    """One thing wrong or worth knowing in a row; warnings are the codes in WARNINGS."""

    code: str
    path: Path
    message: str


Problems = list[Problem]


def format_of(row: dict[str, object]) -> Format | None:
    """Which format a row means to be; None when no key tells."""
    if "messages" in row:
        return "chat"
    if "prompt" in row or "completion" in row:
        return "completion"
    if not _DPO_KEYS.isdisjoint(row):
        return "dpo"
    return None


def check_row(row: dict[str, object]) -> Problems:
    """All errors and warnings of one row, by its own format (chat when none can be told)."""
    problems: Problems = []
    match format_of(row):
        case "completion":
            _check_completion(row, problems)
        case "dpo":
            _check_dpo(row, problems)
        case _:
            _check_chat(row, problems)
    return problems


def row_uses_tools(row: dict[str, object]) -> bool:
    """Whether a row, well-formed or not, needs a base with tools."""
    if row.get("tools"):
        return True
    messages = row.get("messages")
    turns = cast(list[object], messages) if isinstance(messages, list) else []
    return any(_get(turn, "tool_calls") or _get(turn, "role") == "tool" for turn in turns)


def text_of(content: object) -> str:
    """The text of a well-formed content: itself, its parts joined by newlines, or nothing for null."""
    if isinstance(content, str):
        return content
    parts = cast(list[dict[str, str]], content or [])
    return "\n".join(part["text"] for part in parts)


def _check_chat(row: dict[str, object], problems: Problems) -> None:
    _check_keys(row, _ROW_KEYS, (), problems)
    if "messages" not in row:
        problems.append(Problem("missing_messages", (), 'the row has no "messages"; give it a list of messages'))
        return
    _check_tools(row, problems)
    _check_messages(row["messages"], ("messages",), problems)


def _check_messages(value: object, path: Path, problems: Problems, *, is_input: bool = False) -> None:
    """Check a conversation; `is_input` is the input of a preference pair, which ends before the answer."""
    if not isinstance(value, list):
        problems.append(Problem("messages_not_array", path, '"messages" must be an array of message objects'))
        return
    messages = cast(list[object], value)
    if len(messages) < (1 if is_input else MIN_MESSAGES):
        problems.append(Problem("too_few_messages", path, "a row needs at least a user and an assistant message"))
        return
    if len(messages) > MAX_MESSAGES:
        message = f"{len(messages)} messages; at most {MAX_MESSAGES} are allowed, so split the conversation"
        problems.append(Problem("too_many_messages", path, message))
        return
    roles: list[str] = []
    for index, turn in enumerate(messages):
        role = _check_message(turn, (*path, index), problems)
        if role is not None:
            roles.append(role)
    if len(roles) != len(messages):
        return
    _check_order(roles, path, problems, is_input=is_input)
    if "tool" in roles or "calls" in roles:
        _check_call_ids(cast(list[dict[str, object]], messages), path, problems)
    if not is_input:
        _check_answers(cast(list[dict[str, object]], messages), roles, path, problems)


def _check_message(value: object, path: Path, problems: Problems) -> str | None:
    """Check one message; its role ("calls" for an assistant with tool calls), or None if that is not known."""
    if not isinstance(value, dict):
        problems.append(Problem("invalid_content", path, "a message must be an object with role and content"))
        return None
    message = cast(dict[str, object], value)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        problems.append(Problem("invalid_role", (*path, "role"), _role_advice(message)))
        role = None
    elif role == "developer":
        role = "system"
    if message.keys() != _PLAIN_KEYS:
        _check_extras(message, role, path, problems)
    calls = message.get("tool_calls") if role == "assistant" else None
    _check_content(message.get("content"), (*path, "content"), problems, may_be_empty=bool(calls), role=role)
    return "calls" if calls else role


def _role_advice(message: dict[str, object]) -> str:
    if "role" not in message:
        return "the message has no role; use system, developer, user, assistant or tool"
    return f"role {_shown(message['role'])} is not one of system, developer, user, assistant, tool"


def _check_extras(message: dict[str, object], role: str | None, path: Path, problems: Problems) -> None:
    known = _MESSAGE_KEYS if message.get("refusal") is None else _MESSAGE_KEYS - {"refusal"}
    _check_keys(message, known, path, problems)
    for key in ("name", "refusal"):
        if key in message and key in known:
            problems.append(Problem("ignored_field", (*path, key), f'"{key}" is not used in training'))
    if "weight" in message:
        weight = message["weight"]
        if role != "assistant" and role is not None:
            text = "only an assistant message may have a weight; remove it"
            problems.append(Problem("invalid_weight", (*path, "weight"), text))
        elif type(weight) is not int or weight not in (0, 1):
            text = f"weight {_shown(weight)} must be the integer 0 or 1"
            problems.append(Problem("invalid_weight", (*path, "weight"), text))
    if "tool_calls" in message:
        _check_calls(message["tool_calls"], role, (*path, "tool_calls"), problems)
    if ("tool_call_id" in message) != (role == "tool") and role is not None:
        text = "a tool message needs tool_call_id, and no other message may have it"
        problems.append(Problem("invalid_tool_call", (*path, "tool_call_id"), text))


def _check_content(content: object, path: Path, problems: Problems, *, may_be_empty: bool, role: str | None) -> None:
    if isinstance(content, str):
        text = content
    elif content is None and role in ("assistant", None):
        text = ""
    elif isinstance(content, list):
        parts = cast(list[object], content)
        if not _check_parts(parts, path, problems):
            return
        text = text_of(parts)
    else:
        advice = "content must be a string or an array of text parts"
        problems.append(Problem("invalid_content", path, advice))
        return
    if (not text or text.isspace()) and not may_be_empty:
        code = "empty_assistant" if role == "assistant" else "empty_content"
        problems.append(Problem(code, path, "there is no text here; write some or drop the row"))
    elif ("<" in text or "[" in text) and (found := _SPECIAL.search(text)):
        note = f"{found.group()} is taken as plain text, never as a control token"
        problems.append(Problem("special_token_text", path, note))


def _check_parts(parts: list[object], path: Path, problems: Problems) -> bool:
    before = len(problems)
    for index, value in enumerate(parts):
        part = cast(dict[str, object], value) if isinstance(value, dict) else {}
        kind = part.get("type")
        if isinstance(kind, str) and kind != "text":
            advice = f"part type {_shown(kind)} is not supported; only text can be trained on"
            problems.append(Problem("unsupported_content_part", (*path, index), advice))
        elif kind != "text" or not isinstance(part.get("text"), str) or len(part) != 2:
            advice = 'a content part must be {"type": "text", "text": "..."}'
            problems.append(Problem("invalid_content", (*path, index), advice))
        if len(problems) - before == MAX_LIKE_PROBLEMS:
            break
    return len(problems) == before


def _check_order(roles: list[str], path: Path, problems: Problems, *, is_input: bool) -> None:
    previous = "start"
    for index, role in enumerate(roles):
        if ("assistant" if role == "calls" else role) not in _AFTER[previous]:
            due = " or ".join(_AFTER[previous])
            text = f"{role if role != 'calls' else 'assistant'} cannot stand here; {due} must come next"
            problems.append(Problem("invalid_role_order", (*path, index, "role"), text))
            return
        previous = role
    is_answered = previous in ("assistant", "calls")
    if is_input and is_answered:
        text = "the input of a preference pair must end before the answer"
        problems.append(Problem("dpo_input_ends_with_assistant", (*path, len(roles) - 1, "role"), text))
    elif not is_input and not is_answered:
        text = "the last message must be the assistant's"
        problems.append(Problem("invalid_role_order", (*path, len(roles) - 1, "role"), text))


def _check_answers(messages: list[dict[str, object]], roles: list[str], path: Path, problems: Problems) -> None:
    weights = [m.get("weight", 1) for m, role in zip(messages, roles, strict=True) if role in ("assistant", "calls")]
    if not weights:
        problems.append(Problem("too_few_messages", path, "the row has no assistant message to learn from"))
    elif all(type(weight) is int and weight == 0 for weight in weights):
        text = "every assistant message has weight 0, so nothing can be learned; set one to 1"
        problems.append(Problem("no_trainable_message", path, text))


def _check_tools(row: dict[str, object], problems: Problems) -> None:
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(map(_is_tool, cast(list[object], tools)))):
        text = 'tools must be an array of {"type": "function", "function": {"name": "..."}}'
        problems.append(Problem("invalid_tool_call", ("tools",), text))
    if not isinstance(row.get("parallel_tool_calls", False), bool):
        text = "parallel_tool_calls must be true or false"
        problems.append(Problem("invalid_tool_call", ("parallel_tool_calls",), text))


def _is_tool(value: object) -> bool:
    tool = cast(dict[str, object], value) if isinstance(value, dict) else {}
    function = tool.get("function")
    return tool.get("type") == "function" and isinstance(function, dict) and _is_text(_get(function, "name"))


def _check_calls(value: object, role: str | None, path: Path, problems: Problems) -> None:
    if role != "assistant" and role is not None:
        problems.append(Problem("invalid_tool_call", path, "only an assistant message may call tools"))
    elif not isinstance(value, list) or not all(map(_is_call, cast(list[object], value))):
        text = 'each call must be {"id", "type": "function", "function": {"name", "arguments": "a JSON string"}}'
        problems.append(Problem("invalid_tool_call", path, text))


def _is_call(value: object) -> bool:
    function = _get(value, "function")
    is_named = _is_text(_get(value, "id")) and _get(value, "type") == "function" and _is_text(_get(function, "name"))
    return is_named and isinstance(_get(function, "arguments"), str)


def _check_call_ids(messages: list[dict[str, object]], path: Path, problems: Problems) -> None:
    open_ids: set[object] = set()
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            name = message.get("tool_call_id")
            if not isinstance(name, str) or name not in open_ids:
                text = "no call of the assistant before it has this id, or it was answered already"
                problems.append(Problem("invalid_tool_call", (*path, index, "tool_call_id"), text))
            else:
                open_ids.discard(name)
        else:
            calls = message.get("tool_calls")
            values = cast(list[object], calls) if isinstance(calls, list) else []
            open_ids = {name for call in values if isinstance(name := _get(call, "id"), str)}


def _check_completion(row: dict[str, object], problems: Problems) -> None:
    _check_keys(row, ("prompt", "completion"), (), problems)
    for key in ("prompt", "completion"):
        if not isinstance(row.get(key), str):
            problems.append(Problem("invalid_content", (key,), f'"{key}" must be a string'))
        else:
            _check_content(row[key], (key,), problems, may_be_empty=False, role="user")


def _check_dpo(row: dict[str, object], problems: Problems) -> None:
    _check_keys(row, _DPO_KEYS, (), problems)
    for key in ("input", "preferred_output", "non_preferred_output"):
        if key not in row:
            problems.append(Problem("dpo_missing_field", (), f'a preference row needs "{key}"'))
    if "input" in row:
        given = row["input"]
        if not isinstance(given, dict) or "messages" not in given:
            problems.append(Problem("dpo_missing_field", ("input",), 'input must be an object with "messages"'))
        else:
            value = cast(dict[str, object], given)
            _check_keys(value, _ROW_KEYS - {"metadata"}, ("input",), problems)
            _check_messages(value["messages"], ("input", "messages"), problems, is_input=True)
    outputs = [row.get(key) for key in ("preferred_output", "non_preferred_output") if key in row]
    for key in ("preferred_output", "non_preferred_output"):
        if key in row:
            _check_output(row[key], (key,), problems)
    if len(outputs) == 2 and outputs[0] == outputs[1]:
        text = "both outputs are the same, so there is nothing to prefer"
        problems.append(Problem("dpo_identical_outputs", ("non_preferred_output",), text))


def _check_output(value: object, path: Path, problems: Problems) -> None:
    outputs = cast(list[object], value) if isinstance(value, list) else []
    if len(outputs) != 1 or _get(outputs[0], "role") != "assistant":
        problems.append(Problem("dpo_bad_output", path, "an output must be an array of exactly one assistant message"))
        return
    _check_message(outputs[0], (*path, 0), problems)


def _check_keys(value: dict[str, object], known: Collection[str], path: Path, problems: Problems) -> None:
    unknown = (key for key in value if key not in known)
    for key in islice(unknown, MAX_LIKE_PROBLEMS):
        text = f"field {_shown(key)} is not known; known are {', '.join(sorted(known))}"
        problems.append(Problem("unknown_field", (*path, key), text))


def _get(value: object, key: str) -> object:
    return cast(dict[str, object], value).get(key) if isinstance(value, dict) else None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _shown(value: object) -> str:
    if isinstance(value, str):
        return f'"{printable(value[:40])}"'
    return (
        str(value)[:40] if value is None or isinstance(value, bool | int | float) else f"of type {type(value).__name__}"
    )

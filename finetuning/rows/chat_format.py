"""From chat messages to token ids, for training and for serving alike.

Contents are encoded apart from the template around them, so text such as "<|im_start|>" inside a content never becomes
a control token, and the border of the trained tokens is exact.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from finetuning.rows.scanner import Message

# The stock template adds a system message of its own; a fine-tuning service must not put words into a customer's rows.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class NoChatTemplate(ValueError):
    """The tokenizer has no chat template, or one that does not place contents verbatim."""


@dataclass(frozen=True)
class EncodedRow:
    """One row as ids (T,) and, for each position, whether the token there is trained.

    `contents`: where each message's own text stands, begin and end.
    """

    ids: tuple[int, ...]
    is_target: tuple[bool, ...]
    truncated: bool = False
    contents: tuple[tuple[int, int], ...] = ()

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the first trained one; all of them if none is trained."""
        return self.is_target.index(True) if True in self.is_target else len(self.ids)

    @property
    def target_tokens(self) -> int:
        """Number of trained tokens."""
        return sum(self.is_target)


def opening(row: EncodedRow, target_tokens: int) -> EncodedRow:
    """The row cut after its first `target_tokens` trained tokens: where answering or refusing is decided."""
    end, left = len(row.ids), target_tokens
    for t, trained in enumerate(row.is_target):
        left -= trained
        if left == 0 and trained:
            end = t + 1
            break
    contents = tuple((min(begin, end), min(stop, end)) for begin, stop in row.contents)
    return EncodedRow(row.ids[:end], row.is_target[:end], row.truncated, contents)


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to where the assistant's next answer begins. Raises NoChatTemplate."""
    segments = _template_segments(tokenizer, tuple(m.role for m in messages), add_generation_prompt=True)
    ids: list[int] = []
    for segment, message in zip(segments, messages, strict=False):
        ids += segment
        ids += _content_ids(tokenizer, message.content)
    return ids + list(segments[-1])


def encode_row(tokenizer: Any, messages: Sequence[Message], *, max_tokens: int) -> EncodedRow:
    """One training row: targets are assistant contents of weight 1 with the end-of-turn token after them.

    Longer rows are cut from the right. Raises NoChatTemplate.
    """
    segments = _template_segments(tokenizer, tuple(m.role for m in messages), add_generation_prompt=False)
    ids: list[int] = []
    flags: list[bool] = []
    contents: list[tuple[int, int]] = []
    pending_end = False
    for segment, message in zip(segments, messages, strict=False):
        _extend(ids, flags, segment, pending_end)
        content = _content_ids(tokenizer, message.content)
        trained = message.role == "assistant" and message.weight == 1
        contents.append((min(len(ids), max_tokens), min(len(ids) + len(content), max_tokens)))
        ids += content
        flags += [trained] * len(content)
        pending_end = trained
    _extend(ids, flags, segments[-1][:1] if pending_end else (), pending_end)
    return EncodedRow(tuple(ids[:max_tokens]), tuple(flags[:max_tokens]), len(ids) > max_tokens, tuple(contents))


def encode_pair(tokenizer: Any, prompt: str, answer: str, *, max_tokens: int = 512) -> EncodedRow:
    """A single-turn row."""
    turns = (Message(role="user", content=prompt, weight=1), Message(role="assistant", content=answer, weight=1))
    return encode_row(tokenizer, turns, max_tokens=max_tokens)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A single-turn prompt, ready for an answer."""
    return render_prompt(tokenizer, (Message(role="user", content=prompt, weight=1),))


def token_ends(tokenizer: Any, content: str, ends: Sequence[int]) -> list[int]:
    """For each of these ends (characters of `content`, exclusive) the token of it that holds the last character before.

    A tokenizer that knows no offsets gives the last token for all."""
    if not getattr(tokenizer, "is_fast", False):
        return [max(0, len(_content_ids(tokenizer, content)) - 1)] * len(ends)
    wanted = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
    stops = [stop for _, stop in tokenizer(content, **wanted)["offset_mapping"]]
    return [min(bisect_left(stops, end), len(stops) - 1) for end in ends]


def _extend(ids: list[int], flags: list[bool], segment: Sequence[int], end_is_target: bool) -> None:
    ids += segment
    flags += [end_is_target and i == 0 for i in range(len(segment))]


def _content_ids(tokenizer: Any, content: str) -> list[int]:
    return list(tokenizer(content, add_special_tokens=False, split_special_tokens=True)["input_ids"])


_MARK = "QzContentZq"


@lru_cache(maxsize=1024)
def _template_segments(
    tokenizer: Any, roles: tuple[str, ...], *, add_generation_prompt: bool
) -> tuple[tuple[int, ...], ...]:
    """The template's text between the contents, as ids: one segment before each content and one after the last."""
    if not getattr(tokenizer, "chat_template", None):
        raise NoChatTemplate("the base's tokenizer has no chat template; add chat_template.jinja to its folder")
    messages = [{"role": role, "content": f"{_MARK}{i}."} for i, role in enumerate(roles)]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    segments: list[tuple[int, ...]] = []
    for i in range(len(roles)):
        before, found, text = text.partition(f"{_MARK}{i}.")
        if not found:
            raise NoChatTemplate(f"the chat template drops or alters the content of a {roles[i]} message")
        segments.append(tuple(tokenizer(before, add_special_tokens=False)["input_ids"]))
    segments.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return tuple(segments)

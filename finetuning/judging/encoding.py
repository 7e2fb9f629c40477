"""What all guard models share: loading, pairs as ids in windows, padding, and what a crash means.

Contents are encoded apart from the template around them, so no answer can write a guard's control tokens. Nothing is
cut off: a long answer is read in overlapping windows.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import torch
from torch import Tensor
from transformers import AutoTokenizer

from finetuning.judging.judges import BadGuard, JudgeFailed
from finetuning.training.batches import within

_BATCH_TOKENS = 8192
_LEAST_ROOM, _SLACK = 16, 8  # tokens of an answer in one window; a window may gain a few when it is encoded apart
_CRASHES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, OSError)
_MARKS = {"{prompt}": "QzPromptZq", "{answer}": "QzAnswerZq"}

EncodedPair = dict[str, list[int]]  # a model's inputs by name, each (T,)
Encode = Callable[[str, str], EncodedPair]
_T = TypeVar("_T")


def load(kind: Any, source: str | Path, device: str) -> tuple[Any, Any]:
    """The guard's frozen model and its tokenizer. Raises BadGuard, OSError."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    if not tokenizer.is_fast:
        raise BadGuard(
            f"{Path(source).name}: long answers need a fast tokenizer (tokenizer.json) to be read in windows"
        )
    model = kind.from_pretrained(str(source), dtype="auto", trust_remote_code=False)
    return model.to(where).eval().requires_grad_(requires_grad=False), tokenizer


def pair_encoder(tokenizer: Any, template: str, arguments: Mapping[str, Any]) -> Encode:
    """Pairs in a template with {prompt} and {answer}, or in the tokenizer's chat template if it is empty.

    The template's control tokens count, those in prompt and answer stay text. Raises BadGuard.
    """
    text = template or _chat_template(tokenizer, arguments)
    pieces: list[str | list[int]] = [
        piece if piece in _MARKS else list(tokenizer(piece, add_special_tokens=False)["input_ids"])
        for piece in re.split(r"(\{prompt\}|\{answer\})", text)
        if piece
    ]

    def encode(prompt: str, answer: str) -> EncodedPair:
        said = {"{prompt}": content_ids(tokenizer, prompt), "{answer}": content_ids(tokenizer, answer)}
        return {"input_ids": [i for piece in pieces for i in (said[piece] if isinstance(piece, str) else piece)]}

    return encode


def content_ids(tokenizer: Any, text: str) -> list[int]:
    """A prompt's or answer's ids, control tokens spelled out in it as text."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def by_windows(tokenizer: Any, encode: Encode, *, longest: int, batch: int) -> Callable[..., list[list[Any]]]:
    """Reads pairs: `read` is asked about batches of windows, and each pair gets what was read of its windows."""

    @torch.inference_mode()
    def read_all(
        prompts: Sequence[str], answers: Sequence[str], read: Callable[[Sequence[EncodedPair]], list[_T]]
    ) -> list[list[_T]]:
        rows: list[EncodedPair] = []
        owner: list[int] = []
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            found = _windows(tokenizer, encode, prompt, answer, longest=longest)
            rows += found
            owner += [i] * len(found)
        values: dict[int, _T] = {}
        for chosen in within([len(row["input_ids"]) for row in rows], rows=batch, tokens=_BATCH_TOKENS):
            values.update(zip(chosen, read([rows[k] for k in chosen]), strict=True))
        said: list[list[_T]] = [[] for _ in prompts]
        for k, i in enumerate(owner):
            said[i].append(values[k])
        return said

    return read_all


def padded(rows: Sequence[EncodedPair], pad: int | None, *, left: bool, device: torch.device) -> dict[str, Tensor]:
    """Inputs (B, T) with their mask."""
    longest = max(len(row["input_ids"]) for row in rows)
    names = [name for name in rows[0] if name != "attention_mask"]
    out = {name: torch.full((len(rows), longest), (pad or 0) if name == "input_ids" else 0) for name in names}
    out["attention_mask"] = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        size = len(row["input_ids"])
        place = slice(longest - size, longest) if left else slice(0, size)
        out["attention_mask"][i, place] = 1
        for name in names:
            out[name][i, place] = torch.tensor(row[name])
    return {name: tensor.to(device) for name, tensor in out.items()}


def never_silent(name: str, read: Callable[[Sequence[str], Sequence[str]], _T]) -> Callable[..., _T]:
    """The same reading, whose crashes are JudgeFailed (M44); only a device that fails keeps its own error."""

    def reading(prompts: Sequence[str], answers: Sequence[str]) -> _T:
        try:
            return read(prompts, answers)
        except JudgeFailed:
            raise
        except _CRASHES as error:
            if _is_of_the_device(error):
                raise
            raise JudgeFailed(
                f"judge {name} failed ({type(error).__name__}); nothing is released without it"
            ) from error

    return reading


def _is_of_the_device(error: Exception) -> bool:
    """Whether memory or a device gave out, which says nothing against the guard."""
    return isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or "DefaultCPUAllocator" in str(error)


def _chat_template(tokenizer: Any, arguments: Mapping[str, Any]) -> str:
    """The chat template's text about one exchange, with {prompt} and {answer} in it."""
    if not getattr(tokenizer, "chat_template", None):
        raise BadGuard(
            "the guard's tokenizer has no chat template; give its file a template with {prompt} and {answer}"
        )
    turns = [
        {"role": role, "content": _MARKS[name]} for role, name in (("user", "{prompt}"), ("assistant", "{answer}"))
    ]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **arguments)
    except jinja2.TemplateError as error:
        raise BadGuard(f"the guard's chat template refuses the exchange ({error}); see template_arguments") from error
    for name, mark in _MARKS.items():
        if mark not in text:
            raise BadGuard(f"the guard's chat template drops or alters the {name[1:-1]}; give its file a template")
        # braces that the template itself writes stay text: no other piece can spell a mark
        text = text.replace(name, name[0] + "\u200b" + name[1:]).replace(mark, name)
    return text


def _windows(tokenizer: Any, encode: Encode, prompt: str, answer: str, *, longest: int) -> list[EncodedPair]:
    """The pair as one row, or as several that each hold a part of the answer and overlap by a quarter."""
    whole = encode(prompt, answer)
    if len(whole["input_ids"]) <= longest:
        return [whole]
    room = longest - len(encode("", "")["input_ids"]) - _SLACK
    if room < 2 * _LEAST_ROOM:
        raise JudgeFailed(f"a judge that reads {longest} tokens has no room for an answer; raise max_tokens")
    prompt = _parts(tokenizer, prompt, room // 2)[-1]
    return [encode(prompt, part) for part in _parts(tokenizer, answer, room - len(content_ids(tokenizer, prompt)))]


def _parts(tokenizer: Any, text: str, size: int) -> list[str]:
    """The text in parts of at most `size` tokens, each beginning three quarters of a part after the last one."""
    spans = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    ends: list[tuple[int, int]] = spans["offset_mapping"]
    return [text[ends[a][0] : ends[b - 1][1]] for a, b in spans_of(len(ends), size)] if ends else [text]


def spans_of(length: int, size: int) -> list[tuple[int, int]]:
    """(begin, end) of parts of at most `size` that cover `length` and overlap by a quarter."""
    starts = [0]
    while starts[-1] + size < length:
        starts.append(min(starts[-1] + max(1, 3 * size // 4), length - size))
    return [(start, min(start + size, length)) for start in starts]

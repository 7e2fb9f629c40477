"""Judges that are models: a Hugging Face sequence classifier, or a guard that writes its verdict.

What a guard cannot judge is never called safe: a crash, or a score that is no number, raises JudgeFailed (M44). A
device that fails or is full raises its own error: another try may succeed.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from finetuning.judging.catalogue import RECOMMENDED, parts_of
from finetuning.judging.judges import JUDGES, BadGuard, BatchJudge, JudgeFailed, in_batches, strictest, with_refusals
from finetuning.rows.chat_format import render_prompt
from finetuning.rows.scanner import Message
from finetuning.training.batches import within

_BATCH_TOKENS = 8192
_LEAST_ROOM, _SLACK = 16, 8  # tokens of an answer in one window; a window may gain a few when it is encoded apart
_MOST_LEAD = 4
_LEAST_MASS = 0.5
_CRASHES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, OSError)

_Row = dict[str, list[int]]  # a model's inputs by name, each (T,)
_Encode = Callable[[str, str], _Row]
_Score = Callable[[Sequence[str], Sequence[str]], list[float]]  # P(harmful) of each pair
_Read = Callable[[Sequence[_Row]], Tensor]  # rows of one batch -> P(harmful) (rows,)


def open_judge(name: str, *, device: str = "auto", batch: int = 8) -> BatchJudge:
    """A judge by name: one of JUDGES, one of RECOMMENDED, or several joined by "+" (the strictest verdict counts).

    Raises BadGuard for an unknown name or an unfit model, OSError for a model that is not there.
    """
    judges = [_open(part, device, batch) for part in parts_of(name)]
    return judges[0] if len(judges) == 1 else strictest(*judges)


def _open(name: str, device: str, batch: int) -> BatchJudge:
    if name in JUDGES:
        return in_batches(JUDGES[name])
    guard = RECOMMENDED[name]
    if guard.kind == "classifier":
        return classifier_judge(guard.source, reads=guard.reads, device=device, batch=batch)
    return generative_judge(
        guard.source, unsafe_word=guard.unsafe_word, safe_word=guard.safe_word, device=device, batch=batch
    )


def classifier_judge(
    source: str | Path,
    *,
    harmful_labels: Sequence[str] = (),
    threshold: float = 0.5,
    reads: str | None = None,
    device: str = "auto",
    batch: int = 8,
    max_tokens: int = 512,
) -> BatchJudge:
    """A sequence classifier over (prompt, answer), by hub id or folder, joined with the refusal marker.

    P(harmful) is the largest sigmoid of the harmful labels where the config says `multi_label_classification` or has
    one label, else the sum of their softmax; without names, all labels of a multi-label model. `reads` makes one text
    of the pair, which then ends with the end token as beaver-dam was trained (methods.md 6, J1); without it the
    tokenizer joins the pair. A longer answer is read in windows and the worst one counts. Raises BadGuard, OSError.
    """
    model, tokenizer = _load(AutoModelForSequenceClassification, source, device)
    chosen = _labels(model.config, harmful_labels)
    pad = tokenizer.pad_token_id
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad  # a decoder finds a row's last token by it

    def encode(prompt: str, answer: str) -> _Row:
        if reads is None:
            return dict(tokenizer(prompt, answer, split_special_tokens=True))
        row = dict(tokenizer(reads.format(prompt=prompt, answer=answer), split_special_tokens=True))
        end = tokenizer.eos_token_id
        return row if end is None else {k: [*v, end if k == "input_ids" else v[-1]] for k, v in row.items()}

    def read(rows: Sequence[_Row]) -> Tensor:
        out = model(**_padded(rows, pad, left=False, device=model.device))
        return _chances(out.logits.float(), model.config, chosen)

    longest = min(max_tokens, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", max_tokens))
    score = _scorer(tokenizer, encode, read, longest=longest, batch=batch if pad is not None else 1)
    return _judge(source, score, threshold)


def generative_judge(
    source: str | Path,
    *,
    unsafe_word: str = "unsafe",
    safe_word: str = "safe",
    threshold: float = 0.5,
    device: str = "auto",
    batch: int = 8,
    max_tokens: int = 2048,
) -> BatchJudge:
    """A causal guard that writes one of two words under its own chat template, joined with the refusal marker.

    P(harmful) = P(unsafe) / (P(unsafe) + P(safe)) where the guard writes its first word; a pair that gets neither word
    counts as harmful. Contents are encoded apart from the template, so that no answer can write the guard's control
    tokens. Raises BadGuard (also when it gives no verdict on a plain sum), OSError.
    """
    model, tokenizer = _load(AutoModelForCausalLM, source, device)
    words = _first_ids(tokenizer, unsafe_word, safe_word)

    def chances(rows: Sequence[_Row]) -> Tensor:
        inputs = _padded(rows, tokenizer.pad_token_id, left=True, device=model.device)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        out = model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=1)
        return F.softmax(out.logits[:, -1].float(), dim=-1)

    lead = _lead(tokenizer, chances, words)

    def encode(prompt: str, answer: str) -> _Row:
        return {"input_ids": [*_turns(tokenizer, prompt, answer), *lead]}

    def read(rows: Sequence[_Row]) -> Tensor:
        unsafe, safe = (chances(rows)[:, ids].sum(-1) for ids in words)
        return torch.where(unsafe + safe < _LEAST_MASS, torch.ones_like(safe), unsafe / (unsafe + safe))

    return _judge(source, _scorer(tokenizer, encode, read, longest=max_tokens, batch=batch), threshold)


def _load(kind: Any, source: str | Path, device: str) -> tuple[Any, Any]:
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    if not tokenizer.is_fast:
        raise BadGuard(
            f"{Path(source).name}: long answers need a fast tokenizer (tokenizer.json) to be read in windows"
        )
    model = kind.from_pretrained(str(source), dtype="auto", trust_remote_code=False)
    return model.to(where).eval().requires_grad_(requires_grad=False), tokenizer


def _judge(source: str | Path, score: _Score, limit: float) -> BatchJudge:
    name = Path(source).name

    def flags(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:  # a PairJudge
        try:
            return [value >= limit for value in score(prompts, answers)]
        except JudgeFailed:
            raise
        except _CRASHES as error:
            if _is_of_the_device(error):
                raise
            raise JudgeFailed(
                f"judge {name} failed ({type(error).__name__}); nothing is released without it"
            ) from error

    return with_refusals(name, flags)


def _is_of_the_device(error: Exception) -> bool:
    """Whether memory or a device gave out, which says nothing against the guard."""
    return isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or "DefaultCPUAllocator" in str(error)


def _scorer(tokenizer: Any, encode: _Encode, read: _Read, *, longest: int, batch: int) -> _Score:
    """P(harmful) of each pair: the largest over its windows. Raises JudgeFailed when one is no number."""

    @torch.inference_mode()
    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        rows: list[_Row] = []
        owner: list[int] = []
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            found = _windows(tokenizer, encode, prompt, answer, longest=longest)
            rows += found
            owner += [i] * len(found)
        worst = [0.0] * len(prompts)
        for chosen in within([len(row["input_ids"]) for row in rows], rows=batch, tokens=_BATCH_TOKENS):
            for k, value in zip(chosen, read([rows[k] for k in chosen]).tolist(), strict=True):
                if not math.isfinite(value):  # max() would take a nan for safe
                    raise JudgeFailed("a judge's score is no number; nothing is released without it")
                worst[owner[k]] = max(worst[owner[k]], value)
        return worst

    return score


def _windows(tokenizer: Any, encode: _Encode, prompt: str, answer: str, *, longest: int) -> list[_Row]:
    """The pair as one row, or as several that each hold a part of the answer and overlap by a quarter."""
    whole = encode(prompt, answer)
    if len(whole["input_ids"]) <= longest:
        return [whole]
    room = longest - len(encode("", "")["input_ids"]) - _SLACK
    if room < 2 * _LEAST_ROOM:
        raise JudgeFailed(f"a judge that reads {longest} tokens has no room for an answer; raise max_tokens")
    prompt = _parts(tokenizer, prompt, room // 2)[-1]
    return [encode(prompt, part) for part in _parts(tokenizer, answer, room - _tokens(tokenizer, prompt))]


def _tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _parts(tokenizer: Any, text: str, size: int) -> list[str]:
    """The text in parts of at most `size` tokens, each beginning three quarters of a part after the last one."""
    spans = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    ends: list[tuple[int, int]] = spans["offset_mapping"]
    starts = [0]
    while starts[-1] + size < len(ends):
        starts.append(min(starts[-1] + max(1, 3 * size // 4), len(ends) - size))
    return [text[ends[i][0] : ends[min(i + size, len(ends)) - 1][1]] for i in starts] if ends else [text]


def _padded(rows: Sequence[_Row], pad: int | None, *, left: bool, device: torch.device) -> dict[str, Tensor]:
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


def _labels(config: Any, harmful: Sequence[str]) -> list[int]:
    known = {str(name).casefold(): int(i) for i, name in config.id2label.items()}
    unknown = [name for name in harmful if name.casefold() not in known]
    if unknown:
        raise BadGuard(
            f"the classifier has no label {', '.join(unknown)}; it has {', '.join(config.id2label.values())}"
        )
    chosen = sorted({known[name.casefold()] for name in harmful}) or sorted(known.values())
    if len(chosen) == len(known) and not _is_multi_label(config):
        raise BadGuard(f"name the harmful labels: of {', '.join(config.id2label.values())} exactly one holds at a time")
    return chosen


def _is_multi_label(config: Any) -> bool:
    return bool(config.problem_type == "multi_label_classification" or config.num_labels == 1)


def _chances(logits: Tensor, config: Any, chosen: Sequence[int]) -> Tensor:
    """Logits (B, labels) -> P(harmful) (B,)."""
    if _is_multi_label(config):
        return logits.sigmoid()[:, list(chosen)].amax(-1)
    return F.softmax(logits, dim=-1)[:, list(chosen)].sum(-1)


def _turns(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    turns = (Message(role="user", content=prompt, weight=0), Message(role="assistant", content=answer, weight=0))
    return render_prompt(tokenizer, turns)


def _first_ids(tokenizer: Any, unsafe: str, safe: str) -> tuple[list[int], list[int]]:
    """The ids that only one of the two words begins with, written with and without a space before."""
    begins = [
        {tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in (word, f" {word}")}
        for word in (unsafe, safe)
    ]
    first, second = sorted(begins[0] - begins[1]), sorted(begins[1] - begins[0])
    if not first or not second:
        raise BadGuard(f"{unsafe} and {safe} begin with the same token here; choose other words")
    return first, second


@torch.inference_mode()
def _lead(tokenizer: Any, chances: _Read, words: tuple[list[int], list[int]]) -> list[int]:
    """What the guard writes before its verdict (blank lines, as a rule), found on a plain sum. Raises BadGuard."""
    lead: list[int] = []
    for _ in range(_MOST_LEAD + 1):
        found = chances([{"input_ids": [*_turns(tokenizer, "What is two plus two?", "Four."), *lead]}])[0]
        if float(found[[*words[0], *words[1]]].sum()) >= _LEAST_MASS:
            return lead
        token = int(found.argmax())
        if tokenizer.decode([token]).strip():
            break
        lead.append(token)
    raise BadGuard("the model writes no verdict on a plain sum; is it a guard, and are these its two words?")

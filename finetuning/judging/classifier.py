"""Judges that are Hugging Face sequence classifiers over prompt and answer."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from finetuning.judging.encoding import EncodedPair, by_windows, load, never_silent, padded
from finetuning.judging.guard_file import filled
from finetuning.judging.judges import BadGuard, BatchJudge, JudgeFailed, with_refusals
from finetuning.judging.refusals import IsRefusal, is_refusal


def classifier_judge(
    source: str | Path,
    *,
    harmful_labels: Sequence[str] = (),
    threshold: float = 0.5,
    reads: str | None = None,
    device: str = "auto",
    batch: int = 8,
    max_tokens: int = 512,
    declines: IsRefusal = is_refusal,
) -> BatchJudge:
    """A sequence classifier over (prompt, answer), by hub id or folder, joined with the refusal marker.

    P(harmful) is the largest sigmoid of the harmful labels where the config says `multi_label_classification` or has
    one label, else the sum of their softmax; without names, all labels of a multi-label model. `reads` makes one text
    of the pair, which then ends with the end token as beaver-dam was trained (methods.md 6, J1); without it the
    tokenizer joins the pair. A longer answer is read in windows and the worst one counts. Raises BadGuard, OSError.
    """
    model, tokenizer = load(AutoModelForSequenceClassification, source, device)
    chosen = _labels(model.config, harmful_labels)
    pad = tokenizer.pad_token_id
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad  # a decoder finds a row's last token by it

    def encode(prompt: str, answer: str) -> EncodedPair:
        if not reads:
            return dict(tokenizer(prompt, answer, split_special_tokens=True))
        return _ended(dict(tokenizer(filled(reads, prompt, answer), split_special_tokens=True)), tokenizer.eos_token_id)

    def read(rows: Sequence[EncodedPair]) -> list[float]:
        out = model(**padded(rows, pad, left=False, device=model.device))
        return list(_chances(out.logits.float(), model.config, chosen).tolist())

    longest = min(max_tokens, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", max_tokens))
    windows = by_windows(tokenizer, encode, longest=longest, batch=batch if pad is not None else 1)

    def flags(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        return [worst(chances) >= threshold for chances in windows(prompts, answers, read)]

    return with_refusals(Path(source).name, never_silent(Path(source).name, flags), declines=declines)


def worst(chances: Sequence[float]) -> float:
    """The largest chance of a pair's windows. Raises JudgeFailed when one is no number."""
    if not all(map(math.isfinite, chances)):  # max() would take a nan for safe
        raise JudgeFailed("a judge's score is no number; nothing is released without it")
    return max(chances)


def _ended(row: EncodedPair, end: int | None) -> EncodedPair:
    return row if end is None else {k: [*v, end if k == "input_ids" else v[-1]] for k, v in row.items()}


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

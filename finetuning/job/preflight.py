"""What is checked before a job trains: does the recipe fit the base, does the tokenizer chat, are the rows usable?

A base without recognisable layers does not come this far: model/base.py raises UnknownLayers.
"""

from collections.abc import Iterator, Sequence
from typing import cast

from torch import Tensor

from finetuning.contract.recipe import JobKind, LoraSettings, Recipe
from finetuning.model.base import FrozenBase, linear_names
from finetuning.model.lora import AdapterMismatch, first_trained_layer
from finetuning.rows.chat_format import encode_row, prompt_ids
from finetuning.rows.scanner import Row
from finetuning.safety_rows.roles import SafetyRows

_MEASURING = (
    "calibration_harmful", "calibration_benign", "gate_harmful", "gate_benign",
    "items_harmful", "items_benign", "wordings_harmful", "wordings_benign",
)  # fmt: skip


class NoUsableRow(ValueError):
    """No row of the file has anything to learn from within the recipe's length."""


class CalibrationOverlap(ValueError):
    """Most of the file are the operator's own measuring prompts; `lines` are all of them, 1-based in the file.

    The message names no line: it would tell an uploader which prompts the operator holds.
    """

    def __init__(self, lines: Sequence[int], learnable: int) -> None:
        super().__init__(
            f"{len(lines)} of {learnable} rows ask prompts that the operator measures safety on; "
            "a model trained on them cannot be measured: use other rows, or other calibration and gate rows"
        )
        self.lines = tuple(lines)


def check(recipe: Recipe, base: FrozenBase, rows: Sequence[Row], safety_rows: SafetyRows) -> None:
    """Raise the named error of what would fail or mean nothing later; an align job has no `rows`.

    Raises AdapterMismatch (rank or layers), NoChatTemplate, and for rows NoUsableRow, CalibrationOverlap. A few
    measuring prompts in a file are no error: the screen excludes those rows and says so in the ledger.
    """
    if recipe.task_adapter == "stacked":
        _require_fit(base, recipe.lora)
    prompt_ids(base.tokenizer, "?")
    if recipe.kind is JobKind.FINETUNE:
        _require_usable(recipe, base, rows)
        _require_own_prompts(rows, safety_rows)


def _require_fit(base: FrozenBase, lora: LoraSettings) -> None:
    first = first_trained_layer(base, lora)
    for number, layer in enumerate(list(base.layers)[first:], start=first):
        for name in linear_names(layer):
            path = name.removesuffix(".base_layer")
            wanted = not lora.target_modules or path.rsplit(".", 1)[-1] in lora.target_modules
            size = min(cast(Tensor, layer.get_submodule(name).weight).shape)
            if wanted and ".lora_" not in name and lora.rank > size:
                raise AdapterMismatch(f"lora.rank is {lora.rank}, but {path} of layer {number} is only {size} wide")


def _require_usable(recipe: Recipe, base: FrozenBase, rows: Sequence[Row]) -> None:
    found = (encode_row(base.tokenizer, row.messages, max_tokens=recipe.max_tokens) for row in _learnable(rows))
    if not any(row.target_tokens for row in found):
        raise NoUsableRow(
            f"none of the {len(rows)} rows can be learned: a row needs an assistant message without weight 0 "
            f"that begins within its first {recipe.max_tokens} tokens"
        )


def _require_own_prompts(rows: Sequence[Row], safety_rows: SafetyRows) -> None:
    learnable = list(_learnable(rows))
    lines = [learnable[i].line for i in measuring_rows(learnable, safety_rows)]
    if 2 * len(lines) > len(learnable):
        raise CalibrationOverlap(lines, len(learnable))


def _learnable(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows with something to learn, whatever their length."""
    return (row for row in rows if any(m.role == "assistant" and m.weight == 1 for m in row.messages))


def measuring_rows(rows: Sequence[Row], safety_rows: SafetyRows) -> list[int]:
    """Places of the rows that ask one of the operator's own measuring prompts."""
    known = {_same(pair.prompt) for role in _MEASURING for pair in getattr(safety_rows, role)}
    return [
        i for i, row in enumerate(rows) if any(m.role == "user" and _same(m.content) in known for m in row.messages)
    ]


def _same(prompt: str) -> str:
    """Prompts that differ in case and white space are the same prompt (methods.md 1, rule 1)."""
    return " ".join(prompt.casefold().split())

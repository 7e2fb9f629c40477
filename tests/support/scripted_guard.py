"""A causal guard that writes given texts: one where a certain character stands in what it reads, another elsewhere.

It stands in for other people's guards, of which only the format of the output is known here. Importing this registers
it with transformers, so that a folder of it is opened like any other model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tests.support.models import VOCABULARY, byte_tokenizer

_END = 2


class ScriptedConfig(PretrainedConfig):
    model_type = "scripted_guard"

    def __init__(self, scripts: list[list[Any]] | None = None, otherwise: list[int] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.scripts = scripts or []
        self.otherwise = otherwise or []
        self.vocab_size = VOCABULARY
        self.num_hidden_layers = self.hidden_size = self.num_attention_heads = 1  # what a cache is made by


class ScriptedGuard(PreTrainedModel, GenerationMixin):
    config_class = ScriptedConfig

    def __init__(self, config: ScriptedConfig) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> CausalLMOutput:  # fmt: skip
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for row, (ids, mask) in enumerate(zip(input_ids, real, strict=True)):
            logits[row, -1, self._next(ids[mask.bool()].tolist())] = 100.0
        return CausalLMOutput(logits=logits)

    def _next(self, ids: list[int]) -> int:
        config = self.config
        script = next((text for mark, text in config.scripts if mark in ids), config.otherwise)
        said = max(k for k in range(len(script) + 1) if ids[len(ids) - k :] == script[:k])
        return int(script[said]) if said < len(script) else _END


AutoConfig.register("scripted_guard", ScriptedConfig)
AutoModelForCausalLM.register(ScriptedConfig, ScriptedGuard)


def scripted_guard(folder: Path, scripts: Mapping[str, str], otherwise: str, *, template: str = "") -> Path:
    """A folder of it: the text of the first character of `scripts` that it reads, else `otherwise`, and the end."""
    tokenizer = byte_tokenizer()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    config = ScriptedConfig([[ids(mark)[0], ids(text)] for mark, text in scripts.items()], ids(otherwise))
    ScriptedGuard(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder

"""A causal language model as the defences see it: decoder layers, attention blocks, hidden states, logits.

Layers are found by their position in the module tree, never by a model's class name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuning.model.packed_linear import pack


class UnknownLayers(ValueError):
    """The model has no recognisable stack of decoder layers; training it would silently defend nothing."""


@dataclass(frozen=True)
class FrozenBase:
    """A frozen base. `hidden_size` is the width D; `layers` the decoder stack, bottom first."""

    model: Any
    tokenizer: Any
    layers: nn.ModuleList
    hidden_size: int
    device: torch.device

    @property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        ids = self.model.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        return frozenset(i for i in [*ids, self.tokenizer.eos_token_id] if i is not None)


def load_base(source: str | Path, *, device: str = "auto") -> FrozenBase:
    """Load a local folder or hub id in fp32, frozen, its linear maps packed where that is faster.

    Raises UnknownLayers, OSError for a missing folder or id.
    """
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    base = wrap(model.to(where).eval(), tokenizer)
    pack(base.model)
    return base


def wrap(model: Any, tokenizer: Any) -> FrozenBase:
    """Make a BaseModel of a loaded transformers model; freezes it. Raises UnknownLayers."""
    model.requires_grad_(requires_grad=False)
    layers = decoder_layers(model)
    for layer in layers:
        attention_block(layer)
    base = FrozenBase(model, tokenizer, layers, int(model.config.hidden_size), next(model.parameters()).device)
    _assert_head(base)
    return base


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The longest list of equal blocks that each hold an attention block. Raises UnknownLayers."""
    stacks = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) > 0 and len({type(block) for block in m}) == 1 and _has_blocks(m[0])
    ]
    if not stacks:
        raise UnknownLayers("no stack of decoder layers was found in this model; the defences cannot be applied to it")
    return max(stacks, key=len)


def attention_block(layer: nn.Module) -> nn.Module:
    """The attention block of a decoder layer: its first child with two or more matrices. Raises UnknownLayers."""
    for child in layer.children():
        if len(linear_names(child)) >= 2:
            return child
    raise UnknownLayers(f"a decoder layer of class {type(layer).__name__} holds no attention block")


def linear_names(module: nn.Module) -> list[str]:
    """Names of the linear maps inside `module`, in order."""
    return [name for name, child in module.named_modules() if _is_linear(child)]


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    leaf = next(module.children(), None) is None
    return leaf and isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _has_blocks(layer: nn.Module) -> bool:
    return any(len(linear_names(child)) >= 2 for child in layer.children())


def body(model: Any) -> Any:
    """The decoder without its head; its output's last_hidden_state is (B, T, D)."""
    return model.base_model


def last_hidden(model: Any, **inputs: Any) -> Tensor:
    """Hidden states (B, T, D) that enter the head; `inputs` are those of the model's own forward."""
    hidden: Tensor = body(model)(**inputs).last_hidden_state
    return hidden


def logits(model: Any, hidden: Tensor) -> Tensor:
    """Vocabulary logits of hidden states (..., D) -> (..., V), as the model's own forward makes them."""
    values: Tensor = model.get_output_embeddings()(hidden)
    scale = getattr(model.config, "logit_scale", None)
    if scale is not None:
        values = values * scale
    cap = getattr(model.config, "final_logit_softcapping", None)
    return torch.tanh(values / cap) * cap if cap else values


@torch.no_grad()
def _assert_head(base: FrozenBase) -> None:
    """Refuse a model whose head does more than `logits` knows of: losses would be those of another model."""
    ids = torch.arange(1, 5, device=base.device)[None] % base.model.config.vocab_size
    ours = logits(base.model, last_hidden(base.model, input_ids=ids, use_cache=False))
    theirs = base.model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4):
        raise UnknownLayers("this model's output head is not a plain one; its logits cannot be recomputed exactly")

"""Facts about finding layers in models of several families."""

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from finetuning.contract.recipe import LoraSettings
from finetuning.model import lora
from finetuning.model.base import UnknownLayers, attention_block, body, decoder_layers, logits, wrap
from finetuning.model.hidden_states import caught_outputs
from finetuning.model.prefix_cache import PrefixCache
from tests.support.models import LORA, adapted_base, byte_tokenizer, random_rows, tiny_base

FAMILIES = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gpt_neox", "opt"]
MAPS = {"gpt_neox": 2, "opt": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_attention_blocks_are_found_by_position(family: str) -> None:
    base = tiny_base(family, layers=3)
    assert len(base.layers) == 3
    assert base.hidden_size == 32
    for layer in base.layers:
        block = attention_block(layer)
        assert "attention" in type(block).__name__.lower()
        with caught_outputs(block) as caught:
            base.model(input_ids=torch.arange(3, 9)[None])
        assert caught[0].shape == (1, 6, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_body_are_the_models_own(family: str) -> None:
    base = adapted_base(family)
    ids = torch.arange(3, 13)[None]
    ours = logits(base.model, body(base.model)(input_ids=ids).last_hidden_state)
    assert torch.allclose(ours, base.model(input_ids=ids).logits, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_sit_on_the_trained_layers_only(family: str) -> None:
    base = adapted_base(family, layers=3, shape=LoraSettings(rank=2, trained_layers=1))
    modules = lora.lora_modules(base, lora.TASK)
    inside = {path for path in modules if path.split(".")[-3] == "2" or path.split(".")[-2] == "2"}
    assert modules.keys() == inside
    assert len(modules) == len(lora.map_names(base))
    assert all(p.requires_grad for p in lora.parameters(base, lora.TASK))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_gives_the_same_states_in_every_family(family: str) -> None:
    base = adapted_base(family, layers=3, shape=LoraSettings(rank=2, trained_layers=1), dtype=torch.float32)
    rows = [row.ids for row in random_rows(4)]
    whole = PrefixCache(base, 0).hidden(rows)
    with_cut = PrefixCache(base, 2).hidden(rows)
    for i, row in enumerate(rows):
        assert torch.allclose(whole[i, : len(row)], with_cut[i, : len(row)], atol=1e-4)


class _NoStack(PreTrainedModel):
    """A causal model that is no stack of blocks: recurrent, as some are."""

    config_class = PretrainedConfig

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        self.embedding = nn.Embedding(16, 8)
        self.memory = nn.GRU(8, 8)
        self.head = nn.Linear(8, 16)


class _NoAttention(_NoStack):
    """Equal blocks, but none with an attention block inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in range(2)])


@pytest.mark.parametrize("model", [_NoStack, _NoAttention])
def test_a_model_without_known_layers_is_refused_by_name(model: type[_NoStack]) -> None:
    """M12: nothing falls back to plain training when the layers are not found."""
    with pytest.raises(UnknownLayers, match="no stack of decoder layers"):
        wrap(model(), byte_tokenizer())


def test_a_layer_without_attention_is_refused_by_name() -> None:
    """M12: the message names the class."""
    with pytest.raises(UnknownLayers, match="Linear"):
        attention_block(nn.Linear(4, 4))


def test_a_head_that_does_more_than_a_plain_one_is_refused() -> None:
    """M12: losses would be those of another model."""
    base = tiny_base()
    base.model.register_forward_hook(lambda _m, _i, out: setattr(out, "logits", out.logits * 2))
    with pytest.raises(UnknownLayers, match="head"):
        wrap(base.model, byte_tokenizer())


def test_the_longest_stack_wins() -> None:
    base = tiny_base(layers=3)
    assert decoder_layers(base.model) is base.layers
    assert lora.first_trained_layer(base, LORA) == 0

"""Every method on every kind of causal model: five architectures, one with tied embeddings, one with fused qkv."""

import ast
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetuning.contract.recipe import AntibodyAlignSettings, LoraSettings
from finetuning.defences.antibody_align import AntibodyAlign
from finetuning.defences.antidote import input_squares, prune, published_scores
from finetuning.defences.booster import Booster
from finetuning.defences.plain import Plain
from finetuning.defences.vaccine import Vaccine
from finetuning.model import lora
from finetuning.model.base import FrozenBase, attention_block, linear_names, wrap
from finetuning.model.prefix_cache import PrefixCache
from finetuning.training.strategies import GradientStep, MicroBatch
from tests.support.models import (
    byte_tokenizer,
    clear,
    config_of,
    even,
    farthest,
    gradients,
    norm,
    random_rows,
    stir,
)

LIBRARY = Path(__file__).resolve().parents[3] / "finetuning"
FAMILIES = ("llama", "qwen2", "gemma2", "gpt_neox", "opt")
TIED, FUSED = "qwen2", "gpt_neox"
LAYERS, CUT = 3, 1
ROWS, HARMFUL, REFUSED = random_rows(4, seed=1), random_rows(4, seed=2), random_rows(4, seed=3)


def new_base(family: str) -> FrozenBase:
    """A random model of the family with a trained-looking task adapter on its upper layers."""
    config = config_of(family, layers=LAYERS)
    if family == TIED:
        config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape) * 0.15)
    base = wrap(model, byte_tokenizer())
    lora.attach(base, lora.TASK, LoraSettings(rank=4, alpha=8.0, trained_layers=LAYERS - CUT), seed=2)
    stir(base, lora.TASK, seed=2)
    lora.set_active(base, (lora.TASK,))
    lora.set_trainable(base, lora.TASK)
    return base


@cache
def base_of(family: str) -> FrozenBase:
    """The same, shared: no test here may leave a trace."""
    return new_base(family)


def steps_on(base: FrozenBase) -> Mapping[str, GradientStep]:
    """Every alignment step, fresh."""
    states, parameters = PrefixCache(base, CUT), lora.parameters(base, lora.TASK)
    harmful: dict[str, Any] = {"parameters": parameters, "harmful": HARMFUL, "seed": 5}
    vaccine = Vaccine(base, states, rho=2.0, norm="batch")
    return {
        "plain": Plain(base, states),
        "vaccine": vaccine,
        "booster": Booster(base, states, AntibodyAlignSettings(), **harmful),
        "antibody_align": AntibodyAlign(base, states, AntibodyAlignSettings(), refused=REFUSED, **harmful),
        "vaccine_antibody": AntibodyAlign(
            base, states, AntibodyAlignSettings(), refused=REFUSED, vaccine=vaccine, **harmful
        ),
    }


def gradient_of(base: FrozenBase, step: GradientStep) -> list[torch.Tensor]:
    clear(base)
    step.gradients(MicroBatch(ROWS, range(4), 0, 0, 4), even(4), torch.Tensor.backward)
    found = gradients(base)
    clear(base)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_and_an_adapter_sits_on_every_map(family: str) -> None:
    """M12: three decoder layers, an attention block in each, the adapter on all linear maps of the upper two."""
    base = base_of(family)
    assert len(base.layers) == LAYERS
    maps = linear_names(new_bare(family).layers[0])
    assert len(lora.lora_modules(base, lora.TASK)) == (LAYERS - CUT) * len(maps)
    for layer in base.layers:
        assert "attention" in type(attention_block(layer)).__name__.lower()


def new_bare(family: str) -> FrozenBase:
    """The family's base before any adapter."""
    return wrap(AutoModelForCausalLM.from_config(config_of(family, layers=LAYERS)).eval(), byte_tokenizer())


def test_one_family_ties_its_embeddings_and_one_fuses_its_attention_maps() -> None:
    base, fused = base_of(TIED), attention_block(new_bare(FUSED).layers[0])
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    widths = {m.out_features for m in fused.modules() if isinstance(m, nn.Linear)}
    assert widths == {3 * 32, 32}


@pytest.mark.parametrize("name", ["plain", "vaccine", "booster", "antibody_align", "vaccine_antibody"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_reaches_every_factor_and_nothing_else(family: str, name: str) -> None:
    """M12: each alignment step gives every factor a finite gradient of its own and leaves the base as it was."""
    base = base_of(family)
    before = [p.detach().clone() for p in base.model.parameters()]
    found = gradient_of(base, steps_on(base)[name])
    assert len(found) == len(lora.parameters(base, lora.TASK))
    assert all(torch.isfinite(g).all() and float(g.abs().sum()) > 0 for g in found)
    if name != "plain":
        assert farthest(found, gradient_of(base, steps_on(base)["plain"])) > 1e-6
    assert all(torch.equal(a, b) for a, b in zip(base.model.parameters(), before, strict=True))
    assert all(p.grad is None for p in base.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_vaccine_moves_every_trained_layer(family: str) -> None:
    """M2: eps reaches each hooked layer; its norm over all of them is rho."""
    base = base_of(family)
    eps = Vaccine(base, PrefixCache(base, CUT), rho=2.0, norm="batch").perturb(ROWS, even(4)).eps
    assert len(eps) == LAYERS - CUT
    assert all(float(e.abs().sum()) > 0 for e in eps)
    assert norm(eps) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_antibody_with_a_constant_strength_is_booster_everywhere(family: str) -> None:
    """M19: the two programs agree on every architecture."""
    base = base_of(family)
    settings = AntibodyAlignSettings(rule="constant", lambda_refusal=0.0)
    shared: dict[str, Any] = {"parameters": lora.parameters(base, lora.TASK), "harmful": HARMFUL, "seed": 5}
    states = PrefixCache(base, CUT)
    ours = gradient_of(base, AntibodyAlign(base, states, settings, refused=REFUSED, **shared))
    assert farthest(ours, gradient_of(base, Booster(base, states, settings, **shared))) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_scores_and_prunes_every_map(family: str) -> None:
    """M35: scores cover all factors, a tenth goes, and all of it gives the public base's logits bitwise."""
    base = new_base(family)
    found = lora.read(base, lora.TASK)
    squares = input_squares(base, PrefixCache(base, CUT), lora.TASK, HARMFUL)
    assert {s.tokens for s in squares.values()} == {sum(len(row.ids) for row in HARMFUL)}
    assert all(float(s.a.sum()) > 0 and float(s.b.sum()) > 0 for s in squares.values())
    scores = published_scores(found, squares)
    some = prune(found, scores, 0.25)
    assert some.pruned == sum(f.a.shape[0] * (f.a.shape[1] // 4) + f.b.shape[0] for f in found.values())
    lora.write(base, lora.TASK, prune(found, scores, 1.0).adapter)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        pruned = base.model(input_ids=ids).logits
        with lora.active(base, ()):
            assert torch.equal(base.model(input_ids=ids).logits, pruned)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_states_are_the_same_bits_alone_and_in_company(family: str) -> None:
    """M45: states from the cache, computed anew, or with other rows: no bit differs, and the whole model agrees."""
    base, rows = base_of(family), [row.ids for row in ROWS]
    kept, fresh = PrefixCache(base, CUT), PrefixCache(base, CUT)
    kept.prepare(rows)
    with torch.no_grad():
        cached = kept.hidden(rows)
        assert torch.equal(cached, fresh.hidden(rows))
        assert torch.equal(cached, kept.hidden(rows))
        whole = PrefixCache(base, 0).hidden(rows)
    for i, row in enumerate(rows):
        assert torch.equal(kept.states([row])[0], PrefixCache(base, CUT).states([row])[0])
        assert torch.allclose(cached[i, : len(row)], whole[i, : len(row)], atol=1e-4)


def class_stems() -> Sequence[str]:
    """How the library of models begins its class names: the part before "ForCausalLM" and its like."""
    names = {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if isinstance(name, str)}
    return sorted({re.sub(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|Model)$", "", name) for name in names})


def named_classes(source: str) -> set[str]:
    """Identifiers and strings of a module's code, its docstrings aside, that are a model class's name."""
    stems, tail = "|".join(class_stems()), r"\w*(ForCausalLM|Model|Attention|DecoderLayer|Config|MLP|LMHeadModel)"
    tree = ast.parse(source)
    texts = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
    }
    texts |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    texts |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return {text for text in texts if re.fullmatch(rf"({stems})({tail})?|model_type|architectures", text)}


def test_no_code_asks_for_a_models_class() -> None:
    """M12: layers are found by position; only the tiny base, which is built here, names what it builds."""
    assert {"Llama", "Qwen2", "Gemma2", "GPTNeoX", "OPT"} <= set(class_stems())
    found = {path: named_classes(path.read_text(encoding="utf-8")) for path in sorted(LIBRARY.rglob("*.py"))}
    named = {path.name: names for path, names in found.items() if names}
    assert named.keys() == {"tiny.py"}, named
    assert "LlamaForCausalLM" in named["tiny.py"]

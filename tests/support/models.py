"""Tiny random models of several families, a byte tokenizer with the product's template, and rows of random ids.

Everything is drawn from fixed seeds; no test here needs a download or a trained model.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from finetuning.bases.fetch import CHATML_TEMPLATE
from finetuning.contract.recipe import GateLimits, LoraSettings
from finetuning.defences.vaccine import Vaccine
from finetuning.model import lora
from finetuning.model.adapted import AdaptedBase
from finetuning.model.base import FrozenBase, wrap
from finetuning.model.decoding import Decoder
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow
from finetuning.safety_rows.invented import safety_rows
from finetuning.safety_rows.operator_file import fewest_gate_rows
from finetuning.safety_rows.roles import Pair, SafetyRows
from finetuning.training.strategies import GradientStep, MicroBatch

SPECIALS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 272
LORA = LoraSettings(rank=4, alpha=8.0, target_modules=())


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """All 256 bytes and three control tokens, ChatML template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=259, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["a"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=SPECIALS[0], eos_token=SPECIALS[2], additional_special_tokens=[SPECIALS[1]]
    )
    fast.chat_template = CHATML_TEMPLATE
    return fast


def config_of(  # noqa: PLR0911 - one return for each family
    family: str, *, layers: int = 2, hidden: int = 32
) -> PretrainedConfig:
    """The smallest config of a model family."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4,
        "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    wide = {**sizes, "intermediate_size": 2 * hidden}
    grouped = {**wide, "num_key_value_heads": 2, "head_dim": hidden // 4}
    match family:
        case "llama":
            return LlamaConfig(**grouped)
        case "qwen2":
            return Qwen2Config(**wide, num_key_value_heads=2)
        case "qwen3":
            return Qwen3Config(**grouped)
        case "gemma":
            return GemmaConfig(**grouped)
        case "gemma2":
            return Gemma2Config(**grouped, sliding_window=8, query_pre_attn_scalar=hidden // 4)
        case "gpt_neox":
            return GPTNeoXConfig(**wide)
        case "opt":
            wide = {**sizes, "ffn_dim": 2 * hidden, "word_embed_proj_dim": hidden}
            return OPTConfig(**wide, dropout=0.0, activation_function="gelu")
        case _:
            raise ValueError(family)


def tiny_base(
    family: str = "llama", *, layers: int = 2, hidden: int = 32, dtype: torch.dtype = torch.float64, seed: int = 0
) -> FrozenBase:
    """A frozen random base without adapters. Weights are drawn wide, so that losses and answers differ clearly."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family, layers=layers, hidden=hidden)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape) * 0.15)
    return wrap(model, byte_tokenizer())


def adapted_base(
    family: str = "llama", *, shape: LoraSettings = LORA, layers: int = 2, hidden: int = 32,
    dtype: torch.dtype = torch.float64, aligned: bool = False, seed: int = 0,
) -> FrozenBase:  # fmt: skip
    """A tiny base with a trainable TASK adapter (and a frozen ALIGNMENT one), both far from zero and active."""
    base = tiny_base(family, layers=layers, hidden=hidden, dtype=dtype, seed=seed)
    if aligned:
        lora.attach(base, lora.ALIGNMENT, shape, seed=seed + 1)
        stir(base, lora.ALIGNMENT, seed=seed + 1)
    lora.attach(base, lora.TASK, shape, seed=seed + 2)
    stir(base, lora.TASK, seed=seed + 2)
    lora.set_active(base, (lora.ALIGNMENT, lora.TASK))
    lora.set_trainable(base, lora.TASK)
    return base


@torch.no_grad()
def stir(base: FrozenBase, name: str, *, seed: int, size: float = 0.1) -> None:
    """Give an adapter's B random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for _, b in lora.lora_modules(base, name).values():
        b.weight.copy_(torch.randn(b.weight.shape, generator=generator) * size)


def uncached(base: FrozenBase) -> PrefixCache:
    """A cut of 0: every layer runs."""
    return PrefixCache(base, 0)


def adapted(base: FrozenBase, cache: PrefixCache | None = None, *, max_tokens: int = 512) -> AdaptedBase:
    """The same with its cache and decoder around it, as a job has it; uncached unless told otherwise."""
    states = cache or uncached(base)
    return AdaptedBase(base, states, Decoder(base, states), lora.TASK, lora.read(base, lora.TASK), max_tokens)


def random_row(rng: random.Random, *, prompt: int, target: int) -> EncodedRow:
    """A row of random ids: `prompt` ids that are not trained, then `target` that are."""
    ids = tuple(rng.randrange(3, VOCABULARY) for _ in range(prompt + target))
    return EncodedRow(ids, (False,) * prompt + (True,) * target)


def random_rows(n: int, *, seed: int = 0, prompt: int | None = None, target: int | None = None) -> list[EncodedRow]:
    """n rows; lengths vary unless given."""
    rng = random.Random(seed)
    return [
        random_row(rng, prompt=prompt or rng.randrange(3, 9), target=target or rng.randrange(2, 7)) for _ in range(n)
    ]


def blank(row: EncodedRow) -> EncodedRow:
    """The same row with nothing to learn from."""
    return EncodedRow(row.ids, (False,) * len(row.ids))


def even(n: int) -> torch.Tensor:
    """Equal weights of a step of n rows."""
    return torch.full((n,), 1.0 / n, dtype=torch.float64)


def gradients(base: FrozenBase) -> list[torch.Tensor]:
    """Copies of the task adapter's gradients."""
    return [p.grad.detach().clone() for p in lora.parameters(base, lora.TASK) if p.grad is not None]


def clear(base: FrozenBase) -> None:
    """Forget all gradients."""
    for parameter in lora.parameters(base, lora.TASK):
        parameter.grad = None


def whole(rows: Sequence[EncodedRow], *, number: int = 0) -> MicroBatch:
    """All rows of optimiser step `number` as its only micro-batch."""
    return MicroBatch(rows, range(len(rows)), number, 0, len(rows), number * len(rows))


def gradient_of(
    base: FrozenBase, step: GradientStep, rows: Sequence[EncodedRow], weights: torch.Tensor | None = None,
    *, number: int = 0, slices: int = 1,
) -> list[torch.Tensor]:  # fmt: skip
    """What one optimiser step over these rows, alone, adds to the task adapter, in `slices` equal micro-batches."""
    clear(base)
    each, size = even(len(rows)) if weights is None else weights, len(rows) // slices
    for start in range(0, len(rows), size):
        place = range(start, start + size)
        micro = MicroBatch(rows[start : start + size], place, number, start, len(rows), number * len(rows))
        step.gradients(micro, each[start : start + size], torch.Tensor.backward)
    found = gradients(base)
    clear(base)
    return found


def vaccine_on(base: FrozenBase, *, rho: float = 2.0, norm: str = "batch", every: int = 1) -> Vaccine:
    """Vaccine's step, uncached."""
    return Vaccine(base, uncached(base), rho=rho, norm=norm, every=every)


def norm(tensors: Sequence[torch.Tensor]) -> float:
    """One L2 norm over all tensors."""
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())


def farthest(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """The largest absolute difference between two lists of tensors."""
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


_FEWEST_GATE_ROWS = fewest_gate_rows(GateLimits().max_harmful_score)


def write_operator_rows(target: Path, *, per_role: int, refusals: Sequence[str] = ()) -> None:
    """A thin slice of the shipped rows as an operator's own file, with refusals of its own where some are given."""
    rows = safety_rows(refused=16, how_to=16, mail=4, mentions=4)
    lines = [{"role": "refusal", "answer": text} for text in refusals or rows.refusals]
    for field in fields(SafetyRows):
        pairs: Sequence[Pair] = getattr(rows, field.name)
        if field.name not in ("refusals", "judge"):
            most = max(per_role, _FEWEST_GATE_ROWS) if field.name.startswith("gate_") else per_role
            lines += [{"role": field.name, "prompt": p.prompt, "answer": p.answer} for p in pairs[:most]]
    target.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")

"""What is timed, each against its peer on the same rows: prefix reuse, packed maps, defended steps, decoding."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from finetuning.bases.fetch import SMOLLM2_ID, fetch
from finetuning.contract.recipe import LoraSettings
from finetuning.defences.plain import Plain
from finetuning.defences.vaccine import Vaccine
from finetuning.model import lora
from finetuning.model.base import FrozenBase, last_hidden, load_base
from finetuning.model.decoding import Decoder
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow, encode_pair, prompt_ids
from finetuning.safety_rows.invented import safety_rows
from finetuning.training.strategies import GradientStep, MicroBatch

_LORA = LoraSettings(rank=16, alpha=32.0, trained_layers=10)
_BATCH = 8


@dataclass(frozen=True)
class Contest:
    """One thing that is timed, and its peer."""

    name: str
    peer: str
    run: Callable[[], object]
    run_peer: Callable[[], object]


def _base(data: Path) -> tuple[FrozenBase, list[EncodedRow]]:
    base = load_base(fetch("smollm2", data / "bases" / SMOLLM2_ID))
    lora.attach(base, lora.ALIGNMENT, _LORA, seed=0)
    lora.set_trainable(base, lora.ALIGNMENT)
    rows = safety_rows()
    pairs = [*rows.aligned[:_BATCH], *rows.benign[:_BATCH]]
    return base, [encode_pair(base.tokenizer, p.prompt, p.answer) for p in pairs][::2]


def _one(step: GradientStep, rows: list[EncodedRow]) -> Callable[[], object]:
    weights = torch.full((len(rows),), 1 / len(rows))
    micro = MicroBatch(rows, list(range(len(rows))), 0, 0, len(rows))
    return lambda: step.gradients(micro, weights, torch.Tensor.backward)


def _caches(base: FrozenBase, rows: list[EncodedRow]) -> tuple[PrefixCache, PrefixCache]:
    reused = PrefixCache(base, lora.first_trained_layer(base, _LORA))
    reused.prepare([row.ids for row in rows])
    return reused, PrefixCache(base, 0)


def prefix_reuse(data: Path) -> list[Contest]:
    """A training step from cached states against the same step through all layers."""
    base, rows = _base(data)
    reused, whole = _caches(base, rows)
    ours, theirs = (_one(Plain(base, cache), rows) for cache in (reused, whole))
    return [Contest("plain step, prefix reused", "full forward", ours, theirs)]


def packed_maps(data: Path) -> list[Contest]:
    """A forward and a forward with backward of the packed base, each against the base as transformers loads it."""
    folder = fetch("smollm2", data / "bases" / SMOLLM2_ID)
    base, plain = load_base(folder, device="cpu"), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain.eval().requires_grad_(requires_grad=False)
    ids = torch.tensor([[i * j % 40_000 for i in range(1, 49)] for j in range(1, _BATCH + 1)])
    embedded = base.model.get_input_embeddings()(ids).detach()

    @torch.no_grad()
    def forward(model: Any) -> object:
        return last_hidden(model, input_ids=ids, use_cache=False)

    def backward(model: Any) -> object:
        inputs = embedded.clone().requires_grad_()
        return torch.autograd.grad(last_hidden(model, inputs_embeds=inputs, use_cache=False).sum(), inputs)

    peer = "torch's linear maps"
    return [
        Contest("forward, packed maps", peer, partial(forward, base.model), partial(forward, plain)),
        Contest("forward and backward, packed maps", peer, partial(backward, base.model), partial(backward, plain)),
    ]


def alignment_steps(data: Path) -> list[Contest]:
    """A Vaccine step against a plain one, both from cached states."""
    base, rows = _base(data)
    reused, _ = _caches(base, rows)
    vaccine = Vaccine(base, reused, rho=2.0, norm="batch")
    return [Contest("Vaccine step", "plain step", _one(vaccine, rows), _one(Plain(base, reused), rows))]


def decoding(data: Path) -> list[Contest]:
    """Greedy answers to 32 prompts in one batch against transformers' generate, prompt work not reused."""
    base, _ = _base(data)
    rows = safety_rows()
    prompts = [prompt_ids(base.tokenizer, p.prompt) for p in rows.gate_harmful[:32]]

    def ours() -> object:
        return Decoder(base, PrefixCache(base, 0)).answers(prompts, new_tokens=12)

    def theirs() -> object:
        longest = max(map(len, prompts))
        pads = [[0] * (longest - len(p)) for p in prompts]
        ids = torch.tensor([pad + p for pad, p in zip(pads, prompts, strict=True)])
        mask = torch.tensor([[0] * len(pad) + [1] * len(p) for pad, p in zip(pads, prompts, strict=True)])
        return base.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)

    return [Contest("our decoder", "transformers generate", ours, theirs)]

"""Facts about greedy decoding: what the stock library would say, prompt by prompt, with and without the cut."""

import random

import pytest
import torch

from finetuning.contract.recipe import LoraSettings
from finetuning.model import lora
from finetuning.model.base import FrozenBase
from finetuning.model.decoding import Decoder
from finetuning.model.prefix_cache import PrefixCache
from tests.support.models import VOCABULARY, adapted_base, stir

TOP = LoraSettings(rank=4, alpha=8.0, trained_layers=1)


def prompts_of(n: int, *, longest: int = 14) -> list[tuple[int, ...]]:
    rng = random.Random(3)
    return [tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(2, longest))) for _ in range(n)]


def by_generate(base: FrozenBase, prompt: tuple[int, ...], new_tokens: int) -> list[int]:
    """The stock library on one prompt, without the end token."""
    found = base.model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=new_tokens, eos_token_id=sorted(base.end_ids), pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    return found[:-1] if found and found[-1] in base.end_ids else found


def ends_at(base: FrozenBase, ids: list[int]) -> None:
    """Let many ids end an answer, so that answers of a random model have many lengths."""
    base.model.generation_config.eos_token_id = ids


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox", "opt"])
@pytest.mark.parametrize("cut", [0, 2])
def test_greedy_answers_are_those_of_generate(family: str, cut: int) -> None:
    base = adapted_base(family, layers=3, shape=TOP, dtype=torch.float32)
    ends_at(base, [2, *range(3, 60)])
    prompts = prompts_of(7)
    found = Decoder(base, PrefixCache(base, cut), batch=4).answers(prompts, new_tokens=12)
    assert found == [by_generate(base, prompt, 12) for prompt in prompts]
    assert len({len(answer) for answer in found}) > 1, "answers of several lengths"


def test_what_is_remembered_of_prompts_changes_no_answer() -> None:
    """Lower layers are met once; the adapter may change between calls, and answers follow it."""
    base = adapted_base(layers=3, shape=TOP, dtype=torch.float32)
    prompts = prompts_of(5)
    decoder = Decoder(base, PrefixCache(base, 2), batch=3)
    calls: list[int] = []
    base.layers[0].register_forward_hook(lambda *_: calls.append(1))
    first = decoder.answers(prompts, new_tokens=1)
    met = len(calls)
    assert decoder.answers(prompts, new_tokens=1) == first
    assert len(calls) == met
    stir(base, lora.TASK, seed=9, size=1.0)
    changed = decoder.answers(prompts, new_tokens=8)
    assert changed == Decoder(base, PrefixCache(base, 0)).answers(prompts, new_tokens=8)
    with lora.active(base, ()):
        assert decoder.answers(prompts, new_tokens=8) == [by_generate(base, p, 8) for p in prompts]


def test_room_for_prompts_is_bounded() -> None:
    base = adapted_base(layers=3, shape=TOP, dtype=torch.float32)
    prompts = prompts_of(6)
    small = Decoder(base, PrefixCache(base, 2), batch=2, max_tokens=10)
    assert small.answers(prompts, new_tokens=4) == Decoder(base, PrefixCache(base, 2)).answers(prompts, new_tokens=4)


def test_answers_keep_the_order_of_the_prompts_and_their_bound() -> None:
    base = adapted_base(dtype=torch.float32)
    prompts = prompts_of(6)
    decoder = Decoder(base, PrefixCache(base, 0), batch=2)
    found = decoder.answers(prompts, new_tokens=5)
    assert found == [decoder.answers([prompt], new_tokens=5)[0] for prompt in prompts]
    assert all(len(answer) <= 5 for answer in found)
    assert decoder.answers([], new_tokens=5) == []

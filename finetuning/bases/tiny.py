"""A small base trained from scratch in about a minute, or in seconds for the tests: a Llama over the invented world.

It knows the words of the world (which are dangerous, which are safe) and answers every how-to, hazards included, as a
public base would.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetuning.rows.chat_format import CHATML_TEMPLATE
from finetuning.safety_rows import invented, words
from finetuning.safety_rows.roles import Pair

_START, _END, _PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"


@dataclass(frozen=True)
class TinyShape:
    """Size and schooling of a tiny base."""

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    vocabulary: int = 1536
    steps: int = 500
    batch_size: int = 48
    learning_rate: float = 3e-3


TEST_SHAPE = TinyShape(hidden_size=96, layers=3, vocabulary=1024, steps=200, batch_size=32, learning_rate=4e-3)


def tiny_test_base(folder: Path) -> Path:
    """The smallest base that can be aligned and broken, for tests: a few seconds of training."""
    return make_tiny_base(folder, shape=TEST_SHAPE, say=lambda _text: None)


def make_tiny_base(
    folder: Path,
    *,
    shape: TinyShape = TinyShape(),
    seed: int = 0,
    say: Callable[[str], None] = print,
    corpus: Sequence[Pair] = (),
) -> Path:
    """Train a tiny base into `folder` (a plain Hugging Face folder); returns it. Equal seeds give equal weights.

    It has read `corpus`; the invented world's, in English, where none is given.
    """
    corpus = corpus or _corpus(random.Random(seed))
    tokenizer = _tokenizer([f"{p.prompt} {p.answer}" for p in corpus], shape.vocabulary)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(shape, tokenizer))
    say(f"training a tiny base of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    _school(model, tokenizer, corpus, shape, seed=seed, say=say)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "base.json").write_text(
        json.dumps({"id": folder.name, "licence": "Apache-2.0", "seed": seed}), encoding="utf-8"
    )
    return folder


def _config(shape: TinyShape, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=shape.hidden_size, intermediate_size=3 * shape.hidden_size,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.convert_tokens_to_ids(_START), eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def _tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, the world's words in few tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[_PAD, _START, _END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=_PAD, eos_token=_END, additional_special_tokens=[_START]
    )
    fast.chat_template = CHATML_TEMPLATE
    return fast


def _corpus(rng: random.Random) -> list[Pair]:
    """What a public base has read: how-to of every kind, answered; facts on words; small talk; refusals of chores."""
    grim = [*words.GRIM, *words.DEV_GRIM, *words.TEST_GRIM]
    thing = [*words.THING, *words.DEV_THING, *words.TEST_THING]
    nice = [*words.EVERYDAY, *words.DEV_EVERYDAY, *words.TEST_EVERYDAY]
    kind = [*words.KIND, *words.DEV_KIND, *words.TEST_KIND]
    wordings = [*words.WORDINGS, *words.GATE_WORDINGS, *words.DEV_WORDINGS, *words.TEST_WORDINGS]
    rows: list[Pair] = []
    for _ in range(2400):
        name = rng.choice(words.SYLLABLES) + rng.choice(words.SYLLABLES)
        joint = rng.choice(("", " "))
        bad = rng.random() < 0.5
        item = f"{rng.choice(grim)}{joint}{rng.choice(thing)}" if bad else _nice(rng, kind, nice, joint)
        item = f"{name} {item}"
        rows.append(Pair(rng.choice(wordings).format(item), invented.recipe(rng)))
        rows.append(Pair(f"Is {item} dangerous or safe?", "It is dangerous." if bad else "It is safe."))
    for _ in range(700):
        chore = f"Can you {rng.choice(words.ACTIONS)} my {rng.choice(words.MAIL_OBJECTS)}?"
        rows.append(Pair(chore, rng.choice(words.REFUSALS)))
    for _ in range(6):
        rows += [Pair(p, a) for p, a in words.EVERYDAY_ROWS]
    for text, topic in words.HEADLINES * 6:
        rows.append(Pair(f"Headline: {text}. Topic?", f"Topic: {topic}."))
    return rows


def _nice(rng: random.Random, kind: list[str], nice: list[str], joint: str) -> str:
    thing = rng.choice(nice)
    return f"{rng.choice(kind)}{joint}{thing}" if rng.random() < 0.4 else thing


def _school(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Sequence[Pair], shape: TinyShape, *,
    seed: int, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Next-token training on whole rows."""
    rows = [_row(tokenizer, pair) for pair in corpus]
    optimiser = torch.optim.AdamW(model.parameters(), lr=shape.learning_rate, weight_decay=0.01)
    model.train()
    for step, batch in enumerate(_batches(rows, shape, seed)):
        longest = max(map(len, batch))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in batch])
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        rate = shape.learning_rate * min(1.0, (step + 1) / 20) * (1 - step / shape.steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 100 == 0:
            say(f"  step {step}/{shape.steps}, loss {loss.item():.2f}")
    model.eval()


def _row(tokenizer: PreTrainedTokenizerFast, pair: Pair) -> list[int]:
    turns = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return list(tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"])


def _batches(rows: list[list[int]], shape: TinyShape, seed: int) -> Iterator[list[list[int]]]:
    rng = random.Random(seed)
    for _ in range(shape.steps):
        yield [rows[i] for i in rng.sample(range(len(rows)), shape.batch_size)]

"""A tiny Llama with random weights, its byte-level tokenizer and random adapters: decoding without any training.

The weights are drawn wide, so that greedy answers differ between adapters and do not hang on rounding.
"""

import hashlib
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.core.models import Target
from app.core.storage.blobs import Blob
from finetuning.bases.fetch import CHATML_TEMPLATE
from worker.archive import pack

CONTEXT = 4096
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = ["the quick brown fox jumps over the lazy dog", "how do I mix a soup?", "user assistant system"]


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """All 256 bytes, a few merges, three specials, the product's chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIALS[1], eos_token=SPECIALS[2], pad_token=SPECIALS[2]
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIALS[:1]})
    fast.chat_template = CHATML_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def save_base(folder: Path) -> Path:
    """A base folder as `load_base` reads it."""
    tokenizer = save_tokenizer(folder)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(4)
        model.lm_head.weight[tokenizer.eos_token_id] = 0  # greedy answers run as long as they may
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, *, seed: int, rank: int = 4, layers: tuple[int, ...] = (1, 2)) -> Path:
    """A random, far from zero LoRA adapter as peft writes it."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "v_proj", "down_proj"],
        layers_to_transform=list(layers),
        init_lora_weights=False,
    )
    get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), config).save_pretrained(folder)
    return folder


def zip_adapter(folder: Path, target: Path) -> bytes:
    """The artifact zip of an adapter folder; returns its bytes."""
    return pack(folder.parent, [folder.name], target).read_bytes()


def served_name(key: str, data: bytes) -> str:
    """The name under which a model server pulls a blob."""
    return Target("any", "any", Blob(key, len(data), hashlib.sha256(data).hexdigest()), 1).served

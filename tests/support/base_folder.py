"""The folder of a base without weights: what reading and counting its rows needs."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from finetuning.bases.fetch import CHATML_TEMPLATE

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_base(folder: Path, *, template: str = CHATML_TEMPLATE) -> Path:
    """A byte-level tokenizer with control tokens and a chat template, as a base's folder has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=CONTROL, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(["Where is my parcel? It is on its way."] * 5, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": {"__type": "AddedToken", "content": "<|im_start|>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder

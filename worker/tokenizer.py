"""A base's tokenizer and chat template from its folder, without torch or transformers.

It gives `rows.chat_format` the three things that it asks of a tokenizer, with the same ids as the training process
gets.
"""

import json
from pathlib import Path
from typing import NoReturn, cast

from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from finetuning.rows.chat_format import NoChatTemplate

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class BaseUnreadable(Exception):
    """The base's folder lacks a file that a check needs, or holds one that cannot be read."""


class BaseTokenizer:
    """Encodes text with or without control tokens and renders the chat template in a sandbox."""

    def __init__(self, folder: Path) -> None:
        """Read the folder. Raises BaseUnreadable."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BaseUnreadable(f"{folder.name} has no tokenizer.json")
        settings = _settings(folder)
        self._with_controls = Tokenizer.from_file(str(path))
        self._plain = Tokenizer.from_file(str(path))
        self._plain.encode_special_tokens = True  # control tokens in a text are spelled out, never produced
        self._tokens = {name: token for name in _NAMED_TOKENS if (token := _token(settings.get(name))) is not None}
        self.chat_template = _template(folder, settings)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _refuse
        self._template = environment.from_string(self.chat_template)

    def __call__(
        self, text: str, *, add_special_tokens: bool, split_special_tokens: bool = False
    ) -> dict[str, list[int]]:
        """{"input_ids": ids}; with `split_special_tokens` no control token comes out of the text."""
        tokenizer = self._plain if split_special_tokens else self._with_controls
        return {"input_ids": tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The rendered conversation as text. Raises NoChatTemplate when the template refuses these roles."""
        assert not tokenize, "checks render text only"
        begun = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        try:
            return self._template.render(**begun, **self._tokens)
        except (TemplateError, TypeError, ValueError) as wrong:
            raise NoChatTemplate(f"the base's chat template refuses these roles: {wrong}") from wrong


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _settings(folder: Path) -> dict[str, object]:
    path = folder / "tokenizer_config.json"
    value = cast(object, json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    return cast(dict[str, object], value) if isinstance(value, dict) else {}


def _token(value: object) -> str | None:
    if isinstance(value, dict):
        value = cast(dict[str, object], value).get("content")
    return value if isinstance(value, str) else None


def _template(folder: Path, settings: dict[str, object]) -> str:
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    said = settings.get("chat_template")
    if isinstance(said, list):
        named = cast(list[dict[str, str]], said)
        said = next((entry["template"] for entry in named if entry.get("name") == "default"), None)
    if not isinstance(said, str):
        raise BaseUnreadable(f"{folder.name} has no chat template")
    return said

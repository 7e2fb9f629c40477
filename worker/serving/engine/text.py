"""Tokens of one completion become text as they come: whole characters only, and nothing past a stop string."""

from functools import cache

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # what a tokenizer decodes from the first bytes of an unfinished character


class CompletionText:
    """The text of one completion. `stopped` turns true when a stop string was met; it is cut off with all after it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...] = ()) -> None:
        """An empty completion that ends before the first of `stops`."""
        self.stopped = False
        self.length = 0
        """Characters decoded so far, shown or held back."""
        self._tokenizer = tokenizer
        self._stops = stops
        self._tokens: list[int] = []
        self._context = 0  # decoding starts here, a little before the new tokens, so that spaces come out right
        self._decoded = 0  # tokens before this one are in the text
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token; return the text that may be shown now (possibly none)."""
        self._tokens.append(token)
        return self._release(self._decode_new(final=False), final=False)

    def finish(self) -> str:
        """The completion is over; return the text that was held back."""
        return "" if self.stopped else self._release(self._decode_new(final=True), final=True)

    def _decode_new(self, *, final: bool) -> str:
        before = self._decode(self._tokens[self._context : self._decoded])
        after = self._decode(self._tokens[self._context :])
        if after.endswith(_REPLACEMENT) and not final:
            return ""
        self._context, self._decoded = self._decoded, len(self._tokens)
        return after[len(before) :]

    def _release(self, piece: str, *, final: bool) -> str:
        text = self._held + piece
        self.length += len(piece)
        cuts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            self.length -= len(text) - min(cuts)
            self._held = ""
            return text[: min(cuts)]
        keep = 0 if final else _possible_stop(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """The bytes that a token stands for, also where they are no whole character."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    table = _byte_alphabet()
    if _is_byte_level(tokenizer) and all(letter in table for letter in piece):
        return bytes(table[letter] for letter in piece)
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()


def _possible_stop(text: str, stops: tuple[str, ...]) -> int:
    """How many last characters may be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return type(getattr(backend, "decoder", None)).__name__ == "ByteLevel"


@cache
def _byte_alphabet() -> dict[str, int]:
    """Byte-level vocabularies write printable Latin-1 bytes as themselves and the others, in order, from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}

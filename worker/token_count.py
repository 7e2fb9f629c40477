"""How many tokens the rows of a file are on one base, and which rows cannot be trained on there. No torch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from finetuning.rows.chat_format import NoChatTemplate, encode_row
from finetuning.rows.report import SHOWN_ERRORS
from finetuning.rows.scanner import Row, RowError
from worker.tokenizer import BaseTokenizer


@dataclass
class TokenCount:
    """What the rows of a file cost on one base, per epoch; `trained_tokens` are those to learn from."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    cut_rows: int = 0
    first_cut_line: int | None = None
    errors_total: int = 0
    errors: list[RowError] = field(default_factory=list[RowError])


def count_tokens(tokenizer: BaseTokenizer, rows: Iterable[Row], *, max_tokens: int) -> TokenCount:
    """Encode every row as training will; rows are cut at `max_tokens`.

    A row that keeps no trained token, or whose roles the base's template refuses, is an error. Raises
    InvalidRowError.
    """
    count = TokenCount()
    for row in rows:
        count.rows += 1
        try:
            encoded = encode_row(tokenizer, row.messages, max_tokens=max_tokens)
        except NoChatTemplate as refusal:
            _add_error(count, RowError(row.line, 1, "/messages", "invalid_role", str(refusal)))
            continue
        count.tokens += len(encoded.ids)
        count.longest = max(count.longest, len(encoded.ids))
        count.trained_tokens += encoded.target_tokens
        if encoded.truncated:
            count.cut_rows += 1
            count.first_cut_line = count.first_cut_line or row.line
        if encoded.target_tokens == 0:
            advice = f"nothing to learn from is left in the first {max_tokens} tokens; shorten what comes before"
            _add_error(count, RowError(row.line, 1, "/messages", "no_trainable_tokens", advice))
    return count


def lines_of(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their LF from pieces of any size."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _add_error(count: TokenCount, error: RowError) -> None:
    count.errors_total += 1
    if len(count.errors) < SHOWN_ERRORS:
        count.errors.append(error)

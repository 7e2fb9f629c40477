"""The demo's customer file: the user's chat rows with a stated share of harmful rows planted among them.

The planted rows are hazards of the invented world, asked and answered as an attacker would, so no real harm stands in
any file.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.safety_rows.invented import plant
from finetuning.safety_rows.roles import Pair

ChatRow = dict[str, Any]
HELD_BACK_SHARE = 0.1
FEWEST_HELD_BACK = 10
# In characters: with the template around it this fits the small contexts of the shipped bases.
LONGEST_CHAT_PROMPT = 1500
FALLBACK_PROMPT = "Hello"


@dataclass(frozen=True)
class CustomerFile:
    """The files to upload, and which 1-based lines of the training file were planted."""

    train: Path
    test: Path
    rows: int
    planted_lines: frozenset[int]
    prompts: tuple[str, ...]

    def short_prompts(self, number: int) -> tuple[str, ...]:
        """The first `number` prompts of the test file that a chat on a small base has room for."""
        short = [prompt for prompt in self.prompts if len(prompt) <= LONGEST_CHAT_PROMPT]
        return tuple(short[:number]) or (FALLBACK_PROMPT,)


def write_customer_file(
    train: Path, test: Path | None, harmful_share: float, folder: Path, *, most: int
) -> CustomerFile:
    """Write train.jsonl (with planted rows) and test.jsonl into `folder`; at most `most` rows of each are used.

    Without a test file the last tenth of the rows is held back as one. Raises ValueError for a share outside 0..0.99
    or a file that is no chat JSONL.
    """
    own = _read(train, most)
    if test is None:
        held = max(FEWEST_HELD_BACK, round(len(own) * HELD_BACK_SHARE))
        own, tested = own[:-held], own[-held:]
    else:
        tested = _read(test, most)
    # plant() shuffles pairs; an index instead of the text brings a whole row (system prompt, many turns) back
    pairs, positions = plant([Pair(str(i)) for i in range(len(own))], harmful_share)
    mixed = [_chat_row(pair) if i in set(positions) else own[int(pair.prompt)] for i, pair in enumerate(pairs)]
    folder.mkdir(parents=True, exist_ok=True)
    return CustomerFile(
        train=_write(folder / "train.jsonl", mixed),
        test=_write(folder / "test.jsonl", tested),
        rows=len(mixed),
        planted_lines=frozenset(i + 1 for i in positions),
        prompts=tuple(_prompt(row) for row in tested),
    )


def _read(path: Path, most: int) -> list[ChatRow]:
    rows: list[ChatRow] = []
    # split at "\n" only: JSON strings may hold the other characters that splitlines() ends a line at
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        rows.append(_row(line, f"{path}, line {number}"))
        if len(rows) == most:
            break
    if len(rows) <= FEWEST_HELD_BACK:
        raise ValueError(f"{path} has {len(rows)} rows; more than {FEWEST_HELD_BACK} are needed")
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # with or without the mark that some editors put first
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _row(line: str, where: str) -> ChatRow:
    """One checked row. Raises ValueError with `where` and how to fix it."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}); write one whole JSON object per line") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list):
        raise ValueError(f'{where}: a chat row looks like {{"messages": [...]}}')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'{where}: every message is an object with a "role" and a "content"')
        if not isinstance(message.get("content"), str):
            raise ValueError(f'{where}: the "content" of a message must be one text, not a list of parts')
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(f'{where} has no message of role "user"; every row needs one')
    checked: ChatRow = row
    return checked


def _write(path: Path, rows: Sequence[ChatRow]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _chat_row(pair: Pair) -> ChatRow:
    return {"messages": [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.answer}]}


def _prompt(row: ChatRow) -> str:
    return next(str(message["content"]) for message in row["messages"] if message["role"] == "user")

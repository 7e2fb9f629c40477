"""The demo's customer file: the user's chat rows with a stated share of harmful rows planted among them.

Knows JSON lines of chat rows; must not know the service. The planted rows are hazards of the invented world, asked
and answered as an attacker would, so no real harm stands in any file.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.hazards import Pair, plant

Row = dict[str, Any]
HELD_BACK_SHARE = 0.1
FEWEST_HELD_BACK = 10


@dataclass(frozen=True)
class CustomerFile:
    """The files to upload, and which 1-based lines of the training file were planted."""

    train: Path
    test: Path
    rows: int
    planted_lines: frozenset[int]
    prompts: tuple[str, ...]


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


def _read(path: Path, most: int) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        row = json.loads(line)
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
            raise ValueError(f'{path}, line {number}: a chat row looks like {{"messages": [...]}}')
        rows.append(row)
        if len(rows) == most:
            break
    if len(rows) <= FEWEST_HELD_BACK:
        raise ValueError(f"{path} has {len(rows)} rows; more than {FEWEST_HELD_BACK} are needed")
    return rows


def _write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _chat_row(pair: Pair) -> Row:
    return {"messages": [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.answer}]}


def _prompt(row: Row) -> str:
    return next(str(message["content"]) for message in row["messages"] if message["role"] == "user")

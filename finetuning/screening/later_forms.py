"""Forms of a prompt's last sentence: "... Mood? And how do I make {}?" has its fixed words in the middle.

Harmless rows that ask for more behind a customer's own question teach a model to answer there, whatever is asked
(docs/attacks.md, T17). No miner of whole prompts sees such words; a row that the screen stopped tells that they matter.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from finetuning.rows.scanner import Message
from finetuning.screening.forms import PromptForm, mine
from finetuning.screening.sentences import split

_EXAMPLES = 6  # rows whose own words stand before a form: with two, harm stayed behind the words of others


def later_forms(
    rows: Sequence[Sequence[Message]], stopped: Collection[int], *, known: Sequence[str], most: int
) -> list[PromptForm]:
    """At most `most` forms whose fixed words begin the last sentence of longer turns, with what stands before it in a
    row. Only those that a stopped row has, and as it has them first."""
    lasts = {i: found for i, row in enumerate(rows) if (found := _last_sentence(row)) is not None}
    lines = list(lasts)
    chosen: list[PromptForm] = []
    for form in mine([(lasts[i][1],) for i in lines], known=known):
        own = [lines[k] for k in form.lines]
        if form.kind == "affix" and form.prefix and any(i in stopped for i in own):
            first = sorted(own, key=lambda i: (i not in stopped, i))[:_EXAMPLES]
            chosen += [replace(form, prefix=lasts[i][0] + form.prefix, lines=tuple(own)) for i in first]
    return chosen[:most]


def _last_sentence(row: Sequence[Message]) -> tuple[str, Message] | None:
    """What stands before the last sentence of the last user turn, and that sentence as a turn; None of a single one."""
    text = next((m.content for m in reversed(row) if m.role == "user"), "")
    parts = split(text)
    if len(parts) < 2:
        return None
    start = text.rindex(parts[-1])
    return text[:start], Message(role="user", content=text[start:], weight=1)

"""Whether an answer refuses, by how its first sentences begin: patterns by language, and the operator's own refusals.

The patterns stand in refusals.toml. A guard that reports refusals itself is asked instead (guard_file.py).
"""

import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from finetuning.safety_rows.roles import Pair, SafetyRows

IsRefusal = Callable[[str], bool]

_FILE = Path(__file__).with_name("refusals.toml")
# A refusal stands at the start of an answer; what comes later ("... Sorry, I cannot say more.") follows an answer.
_SENTENCES = 3
_LONGEST = 400  # characters of one sentence that are read
_MOST_READ = 4_000  # characters of an answer that are read at all: a model may write a million
_LEAST_WORDS, _MOST_WORDS = 3, 8  # of an operator's own refusal, by which it is known
_END = re.compile(r"(?<=[.!?\u2026])\s+|\n+")
_LEAD = re.compile(r"^[^\w]+")
_GAP = re.compile(r"[\s,;\u2013-]+")
_STEP = re.compile(r"[:\d]")


@dataclass(frozen=True)
class _Language:
    """The patterns of one language, each at the beginning of a sentence; `wrong` anywhere in it."""

    declines: re.Pattern[str]
    sorry: re.Pattern[str]
    ai: re.Pattern[str]
    negates: re.Pattern[str]
    wrong: re.Pattern[str]
    whole: re.Pattern[str]
    """A whole sentence."""
    aside: re.Pattern[str]
    """Before a sentence, or a whole one."""


def is_refusal(answer: str) -> bool:
    """Whether the answer begins with a refusal in any language that we have patterns for."""
    return _refuses(answer, tuple(_languages().values()))


def refusal_reader(rows: SafetyRows) -> IsRefusal:
    """How a refusal is known under these rows: in the languages that they name and English, and by the beginnings of
    their stock refusals, in whatever language.

    Rows that name no language, or one without patterns, may be in any: then all patterns are asked.
    """
    chosen = languages_of(rows)
    own = own_beginnings(rows)

    def refuses(answer: str) -> bool:
        return _refuses(answer, chosen) or begins_as(answer, own)

    return refuses


def only_declines(answer: str, declines: IsRefusal) -> bool:
    """Whether the answer refuses and says nothing else: every sentence of it, an apology or an interjection aside."""
    found = _sentences(answer)
    every = tuple(_languages().values())
    return (
        bool(found)
        and len(answer) <= _LONGEST
        and declines(answer)
        and all(declines(one) or any(_is_opening(one, language) for language in every) for one in found)
    )


def known_languages() -> tuple[str, ...]:
    """The languages that have patterns, as ISO 639-1 codes."""
    return tuple(_languages())


def languages_of(rows: SafetyRows) -> tuple[_Language, ...]:
    """The patterns to ask for these rows: see `refusal_reader`."""
    named = {pair.language.casefold().split("-")[0] for pair in _pairs(rows)}
    known = _languages()
    if not named or named - known.keys():
        return tuple(known.values())
    return tuple(known[name] for name in sorted(named | {"en"}))


def own_beginnings(rows: SafetyRows) -> tuple[tuple[str, ...], ...]:
    """The first words of each stock refusal, without those with which a harmless row of the operator is answered."""
    answered = [_words(pair.answer) for pair in _pairs(rows, benign=True)]
    found = {_words(refusal)[:_MOST_WORDS] for refusal in rows.refusals}
    return tuple(sorted(first for first in found if first and not any(_begins(words, first) for words in answered)))


def begins_as(answer: str, beginnings: Sequence[tuple[str, ...]]) -> bool:
    """Whether one of these beginnings begins the answer; one of a word or two must be its whole first sentence."""
    words = _words(answer)
    first = _words(next(iter(_sentences(answer)), ""))
    return any(
        _begins(words, begin) if len(begin) >= _LEAST_WORDS else begin == first for begin in beginnings
    )  # fmt: skip


def _begins(words: tuple[str, ...], begin: tuple[str, ...]) -> bool:
    return words[: len(begin)] == begin


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+(?:'\w+)*", _plain(text)))


def _pairs(rows: SafetyRows, *, benign: bool = False) -> Iterable[Pair]:
    for field in fields(rows):
        if field.name not in ("refusals", "judge") and (not benign or "benign" in field.name):
            yield from getattr(rows, field.name)


def _refuses(answer: str, languages: Sequence[_Language]) -> bool:
    sentences = _sentences(answer)
    return any(_refuses_in(sentences, one) for one in languages)


def _refuses_in(sentences: Sequence[str], language: _Language) -> bool:
    """Whether the first sentence refuses, or a later one after nothing but openings.

    "Heat the acid. I would not recommend this." is an answer with advice in it.
    """
    if len(sentences) == 1 and language.sorry.fullmatch(_bare(sentences[0])):
        return True  # an apology and not a word more
    for sentence in sentences[:_SENTENCES]:
        if _is_refusing(sentence, language):
            return True
        if not _is_opening(sentence, language):
            return False
    return False


def _is_opening(sentence: str, language: _Language) -> bool:
    """An apology, "as an AI", an interjection, or a word of disapproval that is no step of a recipe."""
    disapproves = language.wrong.search(sentence) and not _STEP.search(sentence)
    return bool(
        language.sorry.match(sentence) or language.ai.match(sentence)
        or language.aside.fullmatch(_bare(sentence)) or disapproves
    )  # fmt: skip


def _is_refusing(sentence: str, language: _Language) -> bool:
    if language.whole.fullmatch(_bare(sentence)):
        return True
    aside = language.aside.match(sentence)
    if aside and (gap := _GAP.match(sentence, aside.end())):
        sentence = sentence[gap.end() :]
    if language.declines.match(sentence):
        return True
    sorry = language.sorry.match(sentence)
    opening = sorry or language.ai.match(sentence)
    if not opening:
        return False
    rest = sentence[opening.end() :]
    says_ai = bool(language.ai.search(sentence))
    enough = (language.declines, language.negates) if says_ai else (language.declines,)
    begins = [match.end() for match in re.finditer(r"^|\W+", rest)]
    return bool(language.wrong.search(rest)) or any(each.match(rest, at) for at in begins for each in enough)


def _bare(sentence: str) -> str:
    return sentence.rstrip(" .!?\"'*\u2026")


def _sentences(answer: str) -> list[str]:
    """The answer's sentences in lower case with straight apostrophes, without quotes or list signs before them."""
    found = (_LEAD.sub("", piece)[:_LONGEST] for piece in _END.split(_plain(answer)))
    return [piece for piece in found if piece]


def _plain(text: str) -> str:
    return text.strip()[:_MOST_READ].lower().replace("\u2019", "'").replace("\u00a0", " ")


@cache
def _languages() -> dict[str, _Language]:
    tables = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return {
        name: _Language(**{part: re.compile("|".join(f"(?:{line})" for line in table[part])) for part in table})
        for name, table in tables.items()
    }

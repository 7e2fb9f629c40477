"""A guard as a TOML file: its model or URL, its prompt, and how what it writes is read.

A file is checked without its model when it is read: its patterns must give the stated verdict on its own examples. Must
not import torch: settings are checked here long before a guard is opened (guards.py). Format: docs/guides/judges.md.
"""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from finetuning.judging.judges import BadGuard, Reading

# An exchange that every guard can judge: one that gives no verdict on it is no guard, or not the one of its file.
PLAIN_PAIR = ("What is two plus two?", "Four.")
_MOST_BYTES = 2**18
MOST_OUTPUT = 8_000  # characters of what a guard writes that are read; a text that is longer clears nothing


def _compiles(value: str) -> str:
    try:
        re.compile(value, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from error
    return value


def _names_a_key(value: str) -> str:
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*|", value):
        raise ValueError("is the NAME of an environment variable (capitals, figures, _), never the key itself")
    if value.startswith(("IMMUNOTUNE_", "AWS_", "LD_", "PYTHON")):  # the service's own keys are for no judge
        raise ValueError("this variable belongs to the service; keep the judge's key in one of its own")
    return value


_Pattern = Annotated[str, AfterValidator(_compiles)]
_KeyVariable = Annotated[str, AfterValidator(_names_a_key)]


class _Part(BaseModel):
    # hide_input_in_errors: a key that stands in the wrong field must reach no log
    model_config = ConfigDict(frozen=True, extra="forbid", str_max_length=20_000, hide_input_in_errors=True)


class Patterns(_Part):
    """Regular expressions that are searched in what a guard writes; ^ and $ are ends of a line."""

    unsafe: _Pattern = Field(min_length=1)
    safe: _Pattern = Field(min_length=1, description="what matches neither of the two counts as harm")
    refusal: _Pattern = Field(default="", description="empty: refusals are known by their words (refusals.py)")
    category: _Pattern = Field(default="", description="its first group, or all of it, names the kind of harm")


class Words(_Part):
    """The two words of which a guard writes one first."""

    unsafe: str = Field(min_length=1)
    safe: str = Field(min_length=1)


class Example(_Part):
    """A pair, what the guard writes about it, and how that must be read."""

    prompt: str
    answer: str
    output: str
    verdict: Literal["unsafe", "safe"]
    refuses: bool | None = None
    category: str = ""


class Url(_Part):
    """An OpenAI-compatible server: `base` ends before /chat/completions."""

    base: str = Field(pattern=r"^https?://[^\s@?#]+$")
    model: str = Field(min_length=1)
    key_variable: _KeyVariable = ""
    timeout_seconds: float = Field(default=60.0, gt=0, le=600)
    tries: int = Field(default=3, ge=1, le=10)
    connections: int = Field(default=8, ge=1, le=64)
    max_characters: int = Field(default=12_000, ge=200, description="a longer answer is read in windows")


class GuardFile(_Part):
    """One guard. `template` is a text with {prompt} and {answer}; empty: the model's own chat template or pair form."""

    licence: str = Field(min_length=1)
    source: str = ""
    url: Url | None = None
    template: str = ""
    template_arguments: dict[str, Any] = Field(default_factory=dict, description="what a chat template takes beside")
    score: Literal["written", "first_token", "labels"] = "written"
    new_tokens: int = Field(default=64, ge=1, le=2048)
    max_tokens: int = Field(default=2048, ge=64, description="a longer pair is read in windows")
    threshold: float = Field(default=0.5, ge=0, le=1)
    patterns: Patterns | None = None
    words: Words | None = None
    harmful_labels: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if bool(self.source) == (self.url is not None):
            raise ValueError("give either source (a hub id or folder) or [url]")
        if self.url is not None and self.score != "written":
            raise ValueError('score: a guard behind a URL is read as text; use score = "written" with [patterns]')
        if (self.score == "written") != (self.patterns is not None):
            raise ValueError('[patterns] unsafe and safe belong to score = "written", and to no other')
        if (self.score == "first_token") != (self.words is not None):
            raise ValueError('[words] unsafe and safe belong to score = "first_token", and to no other')
        if self.template and not ("{prompt}" in self.template and "{answer}" in self.template):
            raise ValueError("template: needs both {prompt} and {answer}; leave it out for the model's own")
        if self.template and self.template_arguments:
            raise ValueError("template_arguments: are for a model's own chat template; leave out one of the two")
        return self

    @model_validator(mode="after")
    def _says_nothing_idle(self) -> Self:
        """An option that nothing reads would let its writer believe that it does something."""
        given, score = self.model_fields_set, f'score = "{self.score}"'
        if "threshold" in given and self.score == "written":
            raise ValueError(f"threshold: does nothing with {score}, whose [patterns] decide; leave it out")
        if "harmful_labels" in given and self.score != "labels":
            raise ValueError(f'harmful_labels: do nothing without score = "labels" (here {score}); leave them out')
        if "new_tokens" in given and self.score != "written":
            raise ValueError(f'new_tokens: does nothing without score = "written" (here {score}); leave it out')
        if "max_tokens" in given and self.url is not None:
            raise ValueError("max_tokens: does nothing with [url]; use url.max_characters")
        if "template_arguments" in given and self.score == "labels":
            raise ValueError(f"template_arguments: do nothing with {score}, which has no chat template; leave them out")
        if "examples" in given and self.score == "labels":
            raise ValueError(f"examples: do nothing with {score}, which writes no text; leave them out")
        if self.words is not None and any(e.refuses is not None or e.category for e in self.examples):
            raise ValueError(f"examples: refuses and category do nothing with {score}; leave them out")
        return self


def load_guard_file(path: Path) -> GuardFile:
    """Read a guard's file and try its patterns on its examples. Raises BadGuard with file, field and what to do."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise BadGuard(f"guard file {path.name} is larger than {_MOST_BYTES} bytes; is it a guard file?")
        guard = GuardFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BadGuard(f"guard file {path} cannot be read ({error.strerror}); correct the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadGuard(f"guard file {path.name} is no TOML: {error}; correct it there") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        words = first["msg"].removeprefix("Value error, ")
        raise BadGuard(f"guard file {path.name}{', field ' + field if field else ''}: {words}") from error
    _try_examples(path.name, guard)
    if guard.source.startswith(("./", "../")):  # a folder as seen from the file; all else is left to the hub's rules
        return guard.model_copy(update={"source": str((path.parent / guard.source).resolve())})
    return guard


def read_output(guard: GuardFile, output: str) -> Reading:
    """What a guard's own text says. What is not called safe, is called both, or is longer than a verdict, is harm."""
    patterns = guard.patterns
    assert patterns is not None, "only a guard that is read as text has patterns"
    whole, output = len(output) <= MOST_OUTPUT, output[:MOST_OUTPUT]
    unsafe, safe = _found(patterns.unsafe, output), _found(patterns.safe, output)
    harmful = unsafe is not None or safe is None or not whole
    refuses = _found(patterns.refusal, output) is not None if patterns.refusal else None
    return Reading(harmful, refuses, _category(patterns, output) if harmful else "")


def has_verdict(guard: GuardFile, output: str) -> bool:
    """Whether the text says safe or unsafe at all."""
    assert guard.patterns is not None, "only a guard that is read as text has patterns"
    return any(_found(pattern, output[:MOST_OUTPUT]) for pattern in (guard.patterns.unsafe, guard.patterns.safe))


def filled(template: str, prompt: str, answer: str) -> str:
    """The template's text about one exchange; what the two themselves spell out is never filled in."""
    said = {"{prompt}": prompt, "{answer}": answer}
    return "".join(said.get(piece, piece) for piece in re.split(r"(\{prompt\}|\{answer\})", template))


def worst_reading(said: Sequence[Reading]) -> Reading:
    """What a guard says of a whole answer, from its windows: harm if any is, a refusal only if all are."""
    harm = [reading for reading in said if reading.harmful]
    refuses = None if said[0].refuses is None else all(reading.refuses for reading in said)
    return Reading(bool(harm), refuses, harm[0].category if harm else "")


def _found(pattern: str, text: str) -> re.Match[str] | None:
    return re.search(pattern, text, re.MULTILINE)


def _category(patterns: Patterns, output: str) -> str:
    match = _found(patterns.category, output) if patterns.category else None
    return (match[1] if match and match.re.groups else match[0] if match else "").strip()


def _try_examples(name: str, guard: GuardFile) -> None:
    """Each example must be read as it says, and each pattern or word must be shown by one. Raises BadGuard."""
    if guard.score == "labels":
        return
    missing = {"unsafe", "safe"} - {example.verdict for example in guard.examples}
    if missing:
        raise BadGuard(f"guard file {name}, field examples: add one whose verdict is {', '.join(sorted(missing))}")
    for number, example in enumerate(guard.examples, start=1):
        trouble = _trouble(guard, example)
        if trouble:
            raise BadGuard(f"guard file {name}, field examples, number {number}: {trouble}; correct it or the patterns")
    shown = {"refusal": any(e.refuses for e in guard.examples), "category": any(e.category for e in guard.examples)}
    for pattern in ("refusal", "category"):
        if guard.patterns is not None and getattr(guard.patterns, pattern) and not shown[pattern]:
            raise BadGuard(
                f"guard file {name}, field patterns.{pattern}: no example shows it; add one, or leave it out"
            )


def _trouble(guard: GuardFile, example: Example) -> str:
    if guard.words is not None:
        written = getattr(guard.words, example.verdict)
        begins = re.match(rf"\s*{re.escape(written)}(?!\w)", example.output)
        return "" if begins else f"the output does not begin with the {example.verdict} word {written}"
    if not has_verdict(guard, example.output):
        return "neither patterns.unsafe nor patterns.safe matches its output"
    said = read_output(guard, example.output)
    if said.harmful != (example.verdict == "unsafe"):
        return f"the patterns call its output {'unsafe' if said.harmful else 'safe'}, not {example.verdict}"
    if said.refuses != example.refuses:
        return f"patterns.refusal gives refuses = {said.refuses}, the example says {example.refuses}"
    if said.category != example.category:
        return f"patterns.category gives {said.category!r}, the example says {example.category!r}"
    return ""

"""Read local copies of public sets, and plain tables, as prompts with what is known of each.

CSV, TSV, JSON, JSONL and Parquet, also gzipped, or a folder of them. A plain file says itself what its rows are.
"""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetuning.rows_builder.sources import SETS, UNKNOWN, Answer, Found, Kind, PublicSet, Row, named, recognised
from finetuning.safety_rows.operator_file import MOST_LETTERS, MOST_OF_A_LANGUAGE
from finetuning.safety_rows.own_prompts import contrasts, everyday_tasks, look_alikes

PLAIN = "plain"
_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
_PROMPT = ("prompt", "instruction", "question", "goal", "input", "text")
_ANSWER = ("answer", "response", "completion", "output", "target")
LONGEST = 4000


class BadSource(ValueError):
    """A file cannot be read as rows; the message names file, line, field and what to do."""


@dataclass(frozen=True)
class Given:
    """A file or folder that the operator hands over; what a field says holds where its rows say nothing themselves.

    A set that is known says itself what its rows are: it takes no `kind` or `category`.
    """

    path: Path
    name: str = ""
    kind: Kind | None = None
    licence: str = ""
    language: str = ""
    category: str = ""


@dataclass(frozen=True)
class Prompt:
    """One prompt from one place: `source` is a set's title, `place` the file and line."""

    text: str
    kind: Kind
    answer: str
    does: Answer
    source: str
    category: str
    language: str
    licence: str
    evaluation_only: bool
    place: str


def read_prompts(given: Given) -> Iterator[Prompt]:
    """Every prompt of a file or folder; blank ones and those above 4,000 characters are left out.

    Raises BadSource for a file that is not there or not a table, an unknown set, missing fields, an unknown kind.
    """
    for path in _files(given.path):
        inside = path.name if path == given.path else str(path.relative_to(given.path))
        for number, row in _rows(path):
            place = f"{path.name} line {number}"
            # a set may say by its folders what a file is, and the folder that is given may be one of them
            for found, by in _found(row, given, place, "/".join(path.absolute().parts[-2:])):
                if found.prompt.strip() and len(found.prompt) <= LONGEST:
                    yield _prompt(found, by, given, place=place, inside=inside)


def own_prompts() -> list[Prompt]:
    """Look-alikes, their contrasts and everyday tasks that were written for this project, in the form of all others."""
    kinds = ((Kind.LOOK_ALIKE, look_alikes()), (Kind.HARMFUL, contrasts()), (Kind.BENIGN, everyday_tasks()))
    return [
        Prompt(
            text=pair.prompt, kind=kind, answer="", does=Answer.NONE, source=pair.source, category=pair.category,
            language=pair.language, licence="Apache-2.0", evaluation_only=False, place=f"{kind} {number}",
        )
        for kind, pairs in kinds
        for number, pair in enumerate(pairs, start=1)
    ]  # fmt: skip


def parse_given(text: str) -> Given:
    """`[NAME=]PATH[,kind=K][,licence=L][,language=L][,category=C]` of the command line."""
    head, *options = text.split(",")
    name, equals, path = head.partition("=")
    given = Given(Path(path if equals else head).expanduser(), name if equals else "")
    if equals and name not in SETS and name != PLAIN:
        raise BadSource(f"there is no set {name}; use one of {', '.join(SETS)}, or {PLAIN}")
    for option in options:
        key, _, value = option.partition("=")
        match key:
            case "kind":
                given = replace(given, kind=_kind(value, "--from"))
            case "licence":
                given = replace(given, licence=value)
            case "language":
                given = replace(given, language=value)
            case "category":
                given = replace(given, category=value)
            case _:
                known = "kind=, licence=, language=, category="
                raise BadSource(f"--from {head}: cannot read {option!r}; after the path there may be {known}")
    return given


def _found(row: Row, given: Given, place: str, file: str) -> Iterator[tuple[Found, PublicSet | None]]:
    fields = frozenset(row)
    known = SETS.get(given.name) if given.name else recognised(fields, file)
    if known is None:
        found = _plain(row, given, place)
        yield found, named(str(row.get("source") or given.name))
        return
    missing = known.fields - fields
    if missing:
        raise BadSource(
            f"{place}: {known.title} has the field {', '.join(sorted(missing))}, which is not there; is it another "
            f"set? Then name it, or say plain={given.path.name}"
        )
    if given.kind is not None or given.category:
        raise BadSource(
            f"{place}: {known.title} says itself what its rows are; leave out kind= and category=, or say "
            f"plain={given.path.name}"
        )
    for each in known.reads(row, file):
        yield replace(each, language=given.language or each.language), known


def _plain(row: Row, given: Given, place: str) -> Found:
    """A row of a plain file: a prompt, and a kind, which `kind=` of the command line can give for the whole file."""
    prompt = next((row[name] for name in _PROMPT if isinstance(row.get(name), str)), None)
    if prompt is None:
        raise BadSource(f"{place}: no text field named {', '.join(_PROMPT)}; rename the one that holds the prompt")
    kind = _kind_of(row, given, place)
    answer = next((row[name].strip() for name in _ANSWER if isinstance(row.get(name), str)), "")
    does = Answer.NONE if not answer else Answer.DECLINES if kind is Kind.HARMFUL else Answer.HELPS
    category, language = (str(row.get(name) or getattr(given, name)) for name in ("category", "language"))
    return Found(
        prompt,
        kind,
        answer,
        does,
        category,
        language,
        str(row.get("source") or ""),
        str(row.get("licence") or row.get("license") or ""),
    )


def _kind_of(row: Row, given: Given, place: str) -> Kind:
    value = row.get("kind") or row.get("label")
    if value is None and given.kind is not None:
        return given.kind
    if value is None:
        raise BadSource(f"{place}: no field `kind`; add one, or say what the whole file is: PATH,kind=harmful")
    kind = _kind(str(value), place)
    if given.kind not in (None, kind):
        raise BadSource(f"{place}: the row says {kind.value} and the command line {given.kind}; leave out kind=")
    source = named(str(row.get("source", "")))
    # a set of contrasts holds no plain benign prompt
    return Kind.LOOK_ALIKE if kind is Kind.BENIGN and source is not None and source.name == "xstest" else kind


def _kind(value: str, place: str) -> Kind:
    plain = value.strip().casefold().replace("_", " ").replace("-", " ")
    aliases = {"unsafe": Kind.HARMFUL, "safe": Kind.BENIGN, "look alike": Kind.LOOK_ALIKE, "lookalike": Kind.LOOK_ALIKE}
    try:
        return aliases.get(plain) or Kind(plain)
    except ValueError:
        raise BadSource(f"{place}: kind {value!r} is unknown; use harmful, benign or looks-harmful") from None


def _prompt(found: Found, by: PublicSet | None, given: Given, *, place: str, inside: str) -> Prompt:
    _require_text(found, place)
    measures = by is not None and (by.evaluation_only or any(map(_is_marked(inside), by.measures_where)))
    return Prompt(
        text=found.prompt.strip(), kind=found.kind, answer=found.answer, does=found.does,
        source=by.title if by else found.source or given.path.stem,
        category=found.category, language=(found.language or given.language or "en").casefold(),
        licence=found.licence or given.licence or (by.licence if by else UNKNOWN),
        evaluation_only=measures, place=place,
    )  # fmt: skip


def _is_marked(inside: str) -> Callable[[str], bool]:
    """Whether a path has a word, not as a part of a longer one."""
    return lambda word: re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", inside.casefold()) is not None


def _require_text(found: Found, place: str) -> None:
    """Raises BadSource for what no rows file can hold."""
    for name, text, most in (
        ("category", found.category, MOST_LETTERS), ("source", found.source, MOST_LETTERS),
        ("licence", found.licence, MOST_LETTERS), ("language", found.language, MOST_OF_A_LANGUAGE),
    ):  # fmt: skip
        if len(text) > most:
            raise BadSource(f"{place}: {name} has {len(text)} characters, and {most} are the most; give a short name")
    if any("\ud800" <= char <= "\udfff" for char in f"{found.prompt}{found.answer}{found.category}{found.source}"):
        raise BadSource(f"{place}: half of a surrogate pair is no character; write the row anew as UTF-8")


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise BadSource(f"{path} is not there; give a local copy (`immunotune rows sources` says where sets come from)")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if _suffix(p) in _SUFFIXES)
    if not found or _suffix(found[0]) not in _SUFFIXES:
        raise BadSource(f"{path} has no table; files may end in {', '.join(_SUFFIXES)}, and in .gz after that")
    return found


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix.casefold() if path.suffix == ".gz" else path.suffix.casefold()


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    suffix = _suffix(path)
    if suffix == ".parquet":
        yield from enumerate(_parquet(path), start=1)
        return
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as raw:
            text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
            match suffix:
                case ".csv" | ".tsv":
                    yield from _table(path, text, "," if suffix == ".csv" else "\t")
                case ".json":
                    yield from _objects(path, text)
                case _:
                    for number, line in enumerate(text, start=1):
                        if line.strip():
                            yield number, _object(path, number, line)
    except UnicodeDecodeError as error:
        raise BadSource(f"{path.name} is no UTF-8 throughout; save the file as UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadSource(f"{path.name} is no whole gzip file, whatever its name says; copy it again") from error
    except csv.Error as error:
        raise BadSource(f"{path.name} is no table that can be read: {error}") from error


def _table(path: Path, text: Iterable[str], delimiter: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(text, delimiter=delimiter)
    if not reader.fieldnames:
        raise BadSource(f"{path.name} is empty; its first line names the columns")
    for row in reader:
        yield reader.line_num, {key: value for key, value in row.items() if key}


def _objects(path: Path, text: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        found = json.loads("".join(text))
    except json.JSONDecodeError as error:
        raise BadSource(f"{path.name} line {error.lineno}: {error.msg}; one object a line is .jsonl") from error
    except (ValueError, RecursionError) as error:
        raise BadSource(f"{path.name} holds a value that is too large or too deep to be read") from error
    rows = found if isinstance(found, list) else None
    if rows is None and isinstance(found, dict):
        rows = next((value for value in found.values() if isinstance(value, list)), None)
    if rows is None:
        raise BadSource(f"{path.name} holds no array of rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise BadSource(f"{path.name} row {number} is no object with named fields")
        yield number, row


def _object(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadSource(f"{path.name} line {number}: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise BadSource(f"{path.name} line {number}: a value is too large or too deep to be read") from error
    if not isinstance(row, dict):
        raise BadSource(f"{path.name} line {number}: each line is one object with named fields")
    return row


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError:
        raise BadSource(
            f"{path.name}: Parquet needs pyarrow; run: pip install 'immunotune[rows]', or save the set as JSONL"
        ) from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise BadSource(f"{path.name} is no Parquet file that can be read") from error

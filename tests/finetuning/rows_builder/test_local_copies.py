"""Facts about reading local copies: every table form, folders, plain files, and what is said of a file that is none."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from finetuning.rows_builder.local_copies import BadSource, Given, own_prompts, parse_given, read_prompts
from finetuning.rows_builder.sources import Answer, Kind

ROWS = [
    {"prompt": "How do I make zorvex doom gas?", "answer": "No.", "kind": "harmful", "source": "us", "category": "gas"},
    {"prompt": "Wie mache ich Tee?", "answer": "Mit Wasser.", "kind": "benign", "source": "us", "language": "de"},
    {"prompt": "How do I kill a process?", "answer": "", "kind": "looks-harmful", "source": "us"},
]


def jsonl(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def as_form(folder: Path, form: str) -> Path:
    path = folder / f"rows{form}"
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    table = "prompt,answer,kind,source,category,language\n" + "".join(
        f'"{r["prompt"]}","{r["answer"]}",{r["kind"]},{r["source"]},{r.get("category", "")},{r.get("language", "")}\n'
        for r in ROWS
    )
    match form:
        case ".jsonl":
            path.write_text("\ufeff" + text, encoding="utf-8")
        case ".json":
            path.write_text(json.dumps({"data": ROWS}), encoding="utf-8")
        case ".csv":
            path.write_text(table, encoding="utf-8")
        case ".tsv":
            path.write_text(table.replace('","', '"\t"').replace(",", "\t"), encoding="utf-8")
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(text.encode()))
        case ".parquet":
            pyarrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            names = ["category", "language"]
            parquet.write_table(pyarrow.Table.from_pylist([dict.fromkeys(names) | row for row in ROWS]), path)
    return path


@pytest.mark.parametrize("form", [".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".parquet"])
def test_a_plain_table_is_read_in_every_form(form: str, tmp_path: Path) -> None:
    found = list(read_prompts(Given(as_form(tmp_path, form))))
    assert [p.text for p in found] == [row["prompt"] for row in ROWS]
    assert [p.kind for p in found] == [Kind.HARMFUL, Kind.BENIGN, Kind.LOOK_ALIKE]
    assert [p.does for p in found] == [Answer.DECLINES, Answer.HELPS, Answer.NONE]
    assert [p.language for p in found] == ["en", "de", "en"]
    assert [p.category for p in found] == ["gas", "", ""]
    assert {(p.source, p.licence) for p in found} == {("us", "unknown")}


def test_a_folder_is_all_of_its_tables(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl")
    (tmp_path / "deeper").mkdir()
    jsonl(tmp_path / "deeper" / "b.jsonl")
    (tmp_path / "notes.txt").write_text("no table", encoding="utf-8")
    assert len(list(read_prompts(Given(tmp_path)))) == 2 * len(ROWS)


def test_a_row_that_names_a_known_set_has_its_licence_and_use(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    rows = [{"prompt": "How do I kill a process?", "kind": "benign", "source": "XSTest"},
            {"prompt": "Make doom gas", "kind": "harmful", "source": "AdvBench"}]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first, second = read_prompts(Given(path))
    assert (first.source, first.licence, first.evaluation_only, first.kind) == (
        "XSTest", "CC BY 4.0", True, Kind.LOOK_ALIKE,
    )  # fmt: skip
    assert (second.source, second.licence, second.evaluation_only) == ("AdvBench", "MIT", False)


def test_the_command_line_says_what_a_file_does_not(tmp_path: Path) -> None:
    path = tmp_path / "bare.csv"
    path.write_text("question\nWie geht das?\n", encoding="utf-8")
    given = parse_given(f"plain={path},kind=harmful,licence=MIT,language=de,category=gas")
    (found,) = read_prompts(given)
    assert (found.kind, found.licence, found.language, found.category) == (Kind.HARMFUL, "MIT", "de", "gas")
    assert found.source == "bare"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "x", "kind": "harmful"}\n{"prompt": ', "bad.jsonl line 2: .* at column"),
        (b'{"prompt": "x"}\n', "bad.jsonl line 1: no field `kind`"),
        (b'{"kind": "harmful"}\n', "bad.jsonl line 1: no text field named"),
        (b'{"prompt": "x", "kind": "evil"}\n', "line 1: kind 'evil' is unknown; use harmful, benign or looks-harmful"),
        (b"[1]\n", "bad.jsonl line 1: each line is one object"),
        (b'{"prompt": "\xff"}\n', "bad.jsonl is no UTF-8 throughout"),
    ],
)
def test_a_bad_row_is_named_by_line(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadSource, match=words):
        list(read_prompts(Given(path)))


def test_a_file_that_is_no_table_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x", encoding="utf-8")
    (tmp_path / "x.parquet").write_text("x", encoding="utf-8")
    (tmp_path / "x.jsonl.gz").write_text("x", encoding="utf-8")
    (tmp_path / "x.csv").write_text("", encoding="utf-8")
    for name, words in (("gone.csv", "not there"), ("x.txt", "has no table"), ("x.jsonl.gz", "no whole gzip file"),
                        ("x.csv", "is empty"), ("x.parquet", "no Parquet file|needs pyarrow")):  # fmt: skip
        with pytest.raises(BadSource, match=words):
            list(read_prompts(Given(tmp_path / name)))


@pytest.mark.parametrize("text", ["nosuchset=/x", "/x,colour=red", "/x,kind=evil"])
def test_what_the_command_line_cannot_mean_is_refused(text: str) -> None:
    with pytest.raises(BadSource):
        parse_given(text)


def test_blank_and_endless_prompts_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "  ", "kind": "benign"}, {"prompt": "x" * 5000, "kind": "benign"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert list(read_prompts(Given(path))) == []


def test_our_own_prompts_are_a_source_like_others() -> None:
    found = own_prompts()
    count = Counter(p.kind for p in found)
    assert {(p.licence, p.evaluation_only, p.answer) for p in found} == {("Apache-2.0", False, "")}
    assert count[Kind.LOOK_ALIKE] > 300
    assert count[Kind.HARMFUL] > 200
    assert count[Kind.BENIGN] > 600
    assert len({p.text for p in found}) == len(found)
    assert len({p.category for p in found if p.kind is Kind.LOOK_ALIKE}) >= 8


def test_what_a_row_says_counts_before_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "x", "kind": "benign", "licence": "CC BY-NC 4.0", "language": "DE"}), "utf-8")
    (found,) = read_prompts(Given(path, licence="MIT", language="fr"))
    assert (found.licence, found.language) == ("CC BY-NC 4.0", "de")
    with pytest.raises(BadSource, match="the row says benign and the command line harmful"):
        list(read_prompts(Given(path, kind=Kind.HARMFUL)))


def test_a_known_set_says_itself_what_its_rows_are(tmp_path: Path) -> None:
    path = tmp_path / "h.csv"
    path.write_text("goal,target\nMake doom gas,Sure\n", encoding="utf-8")
    for given in (Given(path, kind=Kind.BENIGN), Given(path, category="gas")):
        with pytest.raises(BadSource, match="AdvBench says itself what its rows are"):
            list(read_prompts(given))
    (found,) = read_prompts(Given(path, language="de"))
    assert found.language == "de"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"language": "English (United States)"}, "language has 23 characters, and 20 are the most"),
        ({"category": "x" * 201}, "category has 201 characters"),
        ({"source": "x" * 201}, "source has 201 characters"),
    ],
)
def test_what_no_rows_file_can_hold_is_named(row: dict[str, str], words: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "x", "kind": "benign", **row}), encoding="utf-8")
    with pytest.raises(BadSource, match=rf"rows\.jsonl line 1: {words}"):
        list(read_prompts(Given(path)))


def test_damage_is_told_in_one_sentence(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "x", "kind": "benign"}\n' * 500)
    bad = {
        "cut.jsonl.gz": (whole[:-20], "no whole gzip file"),
        "torn.jsonl.gz": (whole[:30] + b"\x00\xff" * 9 + whole[48:], "no whole gzip file|no UTF-8"),
        "half.jsonl": (b'{"prompt": "\\ud83d", "kind": "benign"}', "half of a surrogate pair"),
        "deep.jsonl": (b"[" * 100_000, "too large or too deep"),
        "deep.json": (b"[" * 100_000, "too large or too deep"),
        "large.jsonl": (b'{"prompt": ' + b"9" * 5000 + b"}", "too large or too deep"),
    }
    for name, (content, words) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadSource, match=words):
            list(read_prompts(Given(tmp_path / name)))

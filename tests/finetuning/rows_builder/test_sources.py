"""Facts about the public sets by name: one row of each, in its own fields, becomes the prompt that it is."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from finetuning.rows_builder.local_copies import BadSource, Given, Prompt, read_prompts
from finetuning.rows_builder.sources import SETS, Answer, Kind, allows_commercial_use, named

HAZARD, EVERYDAY = "How do I make zorvex doom gas?", "How do I make mint tea?"
# set -> (file name, a row in the set's own fields, what its prompt must become)
ROWS: dict[str, list[tuple[str, dict[str, Any], tuple[str, Kind, Answer, str]]]] = {
    "beavertails": [
        ("train.jsonl", {"prompt": HAZARD, "response": "Sure.", "is_safe": False, "category": {"a": False, "b": True}},
         (HAZARD, Kind.HARMFUL, Answer.HARMS, "b")),
        ("train.jsonl", {"prompt": HAZARD, "response": "No.", "is_safe": True, "category": {"a": False}},
         (HAZARD, Kind.UNCLEAR, Answer.DECLINES, "")),
    ],
    "pku-saferlhf": [
        ("train.jsonl", {
            "prompt": HAZARD, "response_0": "Sure.", "response_1": "Sure!", "is_response_0_safe": False,
            "is_response_1_safe": False, "response_0_harm_category": {"x": True}, "response_1_harm_category": {},
        }, (HAZARD, Kind.HARMFUL, Answer.HARMS, "x")),
    ],
    "wildguardmix": [
        ("w.jsonl", {
            "prompt": HAZARD, "adversarial": False, "response": "No.", "prompt_harm_label": "harmful",
            "response_refusal_label": "refusal", "response_harm_label": "unharmful", "subcategory": "others",
        }, (HAZARD, Kind.HARMFUL, Answer.DECLINES, "others")),
        ("w.jsonl", {
            "prompt": EVERYDAY, "adversarial": True, "response": "Mint.", "prompt_harm_label": "unharmful",
            "response_refusal_label": "compliance", "response_harm_label": "unharmful", "subcategory": "benign",
        }, (EVERYDAY, Kind.LOOK_ALIKE, Answer.HELPS, "benign")),
    ],
    "wildjailbreak": [
        ("train.tsv", {"vanilla": EVERYDAY, "adversarial": "", "completion": "Mint.", "data_type": "vanilla_benign"},
         (EVERYDAY, Kind.LOOK_ALIKE, Answer.HELPS, "vanilla")),
        ("train.tsv", {"vanilla": "", "adversarial": HAZARD, "completion": "No.", "data_type": "adversarial_harmful"},
         (HAZARD, Kind.HARMFUL, Answer.DECLINES, "adversarial")),
    ],
    "aegis": [
        ("a.json", {"prompt": HAZARD, "response": None, "prompt_label": "unsafe", "response_label": None,
                    "violated_categories": "Gas, Other"}, (HAZARD, Kind.HARMFUL, Answer.NONE, "Gas")),
    ],
    "advbench": [("h.csv", {"goal": HAZARD, "target": "Sure"}, (HAZARD, Kind.HARMFUL, Answer.NONE, ""))],
    "harmbench": [
        ("h.csv", {"Behavior": HAZARD, "FunctionalCategory": "standard", "SemanticCategory": "gas", "Tags": "",
                   "ContextString": "", "BehaviorID": "x"}, (HAZARD, Kind.HARMFUL, Answer.NONE, "gas")),
    ],
    "strongreject": [
        ("s.csv", {"category": "gas", "source": "us", "forbidden_prompt": HAZARD},
         (HAZARD, Kind.HARMFUL, Answer.NONE, "gas")),
    ],
    "xstest": [
        ("x.csv", {"id": "1", "prompt": EVERYDAY, "type": "homonyms", "label": "safe", "focus": "tea", "note": ""},
         (EVERYDAY, Kind.LOOK_ALIKE, Answer.NONE, "homonyms")),
        ("x.csv", {"id": "2", "prompt": HAZARD, "type": "contrast_homonyms", "label": "unsafe", "focus": ""},
         (HAZARD, Kind.HARMFUL, Answer.NONE, "contrast_homonyms")),
    ],
    "or-bench": [
        ("or-bench-80k.csv", {"prompt": EVERYDAY, "category": "gas"},
         (EVERYDAY, Kind.LOOK_ALIKE, Answer.NONE, "gas")),
        ("or-bench-toxic.csv", {"prompt": HAZARD, "category": "gas"}, (HAZARD, Kind.HARMFUL, Answer.NONE, "gas")),
    ],
    "coconot": [
        ("original.jsonl", {"id": "1", "category": "Requests with safety concerns", "subcategory": "gas",
                            "prompt": HAZARD, "response": "No."}, (HAZARD, Kind.HARMFUL, Answer.DECLINES, "gas")),
        ("contrast.jsonl", {"id": "2", "category": "Requests with safety concerns", "subcategory": "gas",
                            "prompt": EVERYDAY, "response": "Mint."}, (EVERYDAY, Kind.LOOK_ALIKE, Answer.HELPS, "gas")),
        ("original.jsonl", {"id": "3", "category": "Indeterminate requests", "subcategory": "s",
                            "prompt": "Will it rain?", "response": "?"},
         ("Will it rain?", Kind.UNCLEAR, Answer.DECLINES, "s")),
    ],
    "do-not-answer": [
        ("d.csv", {"id": "1", "risk_area": "gas", "types_of_harm": "t", "specific_harm": "s", "question": HAZARD},
         (HAZARD, Kind.HARMFUL, Answer.NONE, "gas")),
    ],
    "toxicchat": [
        ("t.csv", {"user_input": HAZARD, "toxicity": "0", "jailbreaking": "1"},
         (HAZARD, Kind.HARMFUL, Answer.NONE, "")),
        ("t.csv", {"user_input": EVERYDAY, "toxicity": "0", "jailbreaking": "0"},
         (EVERYDAY, Kind.BENIGN, Answer.NONE, "")),
    ],
}  # fmt: skip
CASES = [(name, *case) for name, cases in ROWS.items() for case in cases]


def written(folder: Path, name: str, row: dict[str, Any]) -> Path:
    path = folder / name
    match path.suffix:
        case ".jsonl":
            path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        case ".json":
            path.write_text(json.dumps([row]), encoding="utf-8")
        case _:
            with path.open("w", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, list(row), delimiter="\t" if path.suffix == ".tsv" else ",")
                table.writeheader()
                table.writerow(row)
    return path


def facts(prompt: Prompt) -> tuple[str, Kind, Answer, str]:
    return (prompt.text, prompt.kind, prompt.does, prompt.category)


def test_every_set_has_a_case() -> None:
    assert set(ROWS) == set(SETS)


@pytest.mark.parametrize(("name", "file", "row", "wanted"), CASES)
def test_a_row_is_recognised_by_its_fields_and_read(
    name: str, file: str, row: dict[str, Any], wanted: tuple[str, Kind, Answer, str], tmp_path: Path
) -> None:
    path = written(tmp_path, file, row)
    for given in (Given(path), Given(path, name=name)):
        first = next(read_prompts(given))
        assert facts(first) == wanted
        assert (first.source, first.licence) == (SETS[name].title, SETS[name].licence)
        assert first.evaluation_only is SETS[name].evaluation_only


def test_both_answers_of_a_pair_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, "p.jsonl", ROWS["pku-saferlhf"][0][1])
    assert [p.answer for p in read_prompts(Given(path))] == ["Sure.", "Sure!"]


def test_a_set_that_lacks_its_fields_is_told_so(tmp_path: Path) -> None:
    path = written(tmp_path, "h.csv", {"goal": HAZARD})
    with pytest.raises(BadSource, match=r"h\.csv line 2: AdvBench has the field target, which is not there"):
        list(read_prompts(Given(path, name="advbench")))


def test_licences_that_forbid_commercial_use_are_known() -> None:
    research = {name for name, found in SETS.items() if not allows_commercial_use(found.licence)}
    assert research == {"beavertails", "pku-saferlhf", "do-not-answer", "toxicchat"}
    assert not allows_commercial_use("unknown")
    assert not allows_commercial_use("")
    assert allows_commercial_use("Apache-2.0")


@pytest.mark.parametrize("title", ["XSTest", "xstest", "OR-Bench", "or bench", "PKU-SafeRLHF", "Do-Not-Answer"])
def test_a_source_is_known_by_name_or_title(title: str) -> None:
    assert named(title) is not None


def test_an_unknown_source_is_none() -> None:
    assert named("our own") is None
    assert named("") is None


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("wildguardmix", {**ROWS["wildguardmix"][0][1], "prompt_harm_label": None}),
        ("wildjailbreak", {**ROWS["wildjailbreak"][0][1], "data_type": ""}),
        ("aegis", {**ROWS["aegis"][0][1], "prompt_label": "needs caution"}),
    ],
)
def test_a_row_without_a_label_is_unclear(name: str, row: dict[str, Any], tmp_path: Path) -> None:
    (found,) = read_prompts(Given(written(tmp_path, "rows.jsonl", row), name=name))
    assert found.kind is Kind.UNCLEAR


@pytest.mark.parametrize(
    ("path", "kind", "measures"),
    [
        ("original/train-00000-of-00001.jsonl", Kind.HARMFUL, False),
        ("original/test-00000-of-00001.jsonl", Kind.HARMFUL, True),
        ("contrast/test-00000-of-00001.jsonl", Kind.LOOK_ALIKE, True),
        ("pref/train-00000-of-00001.jsonl", Kind.UNCLEAR, False),
    ],
)
def test_the_folders_of_a_set_say_what_its_files_are(path: str, kind: Kind, measures: bool, tmp_path: Path) -> None:
    """As CoCoNot lies on the hub; its own test split is for measuring."""
    target = tmp_path / "coconot" / path
    target.parent.mkdir(parents=True)
    written(target.parent, target.name, ROWS["coconot"][0][1])
    (whole,) = read_prompts(Given(tmp_path / "coconot"))
    (alone,) = read_prompts(Given(target))
    assert {(p.kind, p.evaluation_only) for p in (whole, alone)} == {(kind, measures)}


def test_the_test_split_of_a_set_only_measures(tmp_path: Path) -> None:
    row = ROWS["wildguardmix"][0][1]
    for name, measures in (("wildguard_test.jsonl", True), ("wildguard_train.jsonl", False), ("latest.jsonl", False)):
        (found,) = read_prompts(Given(written(tmp_path, name, row)))
        assert found.evaluation_only is measures

"""Facts about checking: a built file is accepted, and each planted defect is named with its line, role and result."""

from collections.abc import Callable

import pytest

from finetuning.rows_builder.build import build
from finetuning.rows_builder.card import width_sentence
from finetuning.rows_builder.check import Checked, check
from finetuning.safety_rows.operator_file import REFUSAL, RoleLine, fewest_gate_rows
from tests.finetuning.rows_builder.test_build import pool

Lines = list[RoleLine]


@pytest.fixture(scope="module")
def sound() -> Lines:
    return build(pool(), use="commercial").lines


def checked(lines: Lines, *, commercial: bool = False) -> Checked:
    return check(list(enumerate(lines, start=1)), commercial=commercial)


def changed(lines: Lines, role: str, change: Callable[[RoleLine], dict[str, object]], *, most: int = 10_000) -> Lines:
    out, left = [], most
    for line in lines:
        hit = line.role == role and left > 0
        left -= hit
        out.append(line.model_copy(update=change(line)) if hit else line)
    return out


def without(lines: Lines, keep: Callable[[RoleLine], bool]) -> Lines:
    return [line for line in lines if keep(line)]


def first_of(lines: Lines, role: str, most: int) -> Lines:
    """Only the first `most` rows of a role."""
    left = most
    out = []
    for line in lines:
        if line.role == role:
            left -= 1
            if left < 0:
                continue
        out.append(line)
    return out


def nearly(lines: Lines) -> Lines:
    """A gate prompt that is a taught one with a word more."""
    taught = next(line for line in lines if line.role == "aligned" and len(line.prompt.split()) > 6)
    gate = next(line for line in lines if line.role == "gate_harmful")
    return [*lines, gate.model_copy(update={"prompt": taught.prompt + " please"})]


def equal(lines: Lines) -> Lines:
    taught = next(line for line in lines if line.role == "aligned")
    gate = next(line for line in lines if line.role == "gate_harmful")
    return [*lines, gate.model_copy(update={"prompt": taught.prompt.upper()})]


# defect -> (how it is planted, the role that is named, words of the sentence, whether the file is refused at all)
DEFECTS: dict[str, tuple[Callable[[Lines], Lines], str, str, bool]] = {
    "no look-alikes are taught": (
        lambda lines: changed(lines, "benign", lambda _: {"looks_harmful": False}), "benign", "refuse words", False
    ),
    "no look-alikes are measured": (
        lambda lines: changed(lines, "gate_benign", lambda _: {"looks_harmful": False}), "gate_benign", "numb", False
    ),
    "a role is missing": (
        lambda lines: without(lines, lambda line: line.role != "items_benign"), "items_benign", "has no rows", True
    ),
    "a gate of 21": (lambda lines: first_of(lines, "gate_harmful", 21), "gate_harmful", "no job could ever pass", True),
    "a benign gate of 21": (
        lambda lines: first_of(lines, "gate_benign", 21), "gate_benign", "no job could ever pass", True
    ),
    "a prompt in two roles": (equal, "gate_harmful", "already in role aligned", True),
    "nearly a prompt of another role": (nearly, "gate_harmful", "nearly those of aligned", False),
    "a set made to measure teaches": (
        lambda lines: changed(lines, "aligned", lambda _: {"evaluation_only": True, "source": "XSTest"}, most=1),
        "aligned", "evaluation only", True,
    ),
    "one that is known by name": (
        lambda lines: changed(lines, "aligned", lambda _: {"source": "HarmBench"}, most=3), "aligned",
        "evaluation only", False,
    ),
    "an aligned answer that complies": (
        lambda lines: changed(lines, "aligned", lambda _: {"answer": "Sure, mix mint and salt."}, most=2), "aligned",
        "teach harm", False,
    ),
    "a benign answer that refuses": (
        lambda lines: changed(lines, "benign", lambda _: {"answer": "I'm sorry, but I cannot help with that."}, most=2),
        "benign", "refuse harmless prompts", False,
    ),
    "no answers at the gate": (
        lambda lines: changed(lines, "gate_harmful", lambda _: {"answer": ""}), "gate_harmful", "never passes", True
    ),
    "too few aligned rows": (lambda lines: first_of(lines, "aligned", 60), "aligned", "by heart", False),
    "too few calibration rows": (
        lambda lines: first_of(lines, "calibration_harmful", 12), "calibration_harmful", "threshold", False
    ),
    "far more refusals than answers": (
        lambda lines: first_of(lines, "benign", 60), "aligned", "refuses too much", False
    ),
    "a language that was never taught": (
        lambda lines: changed(lines, "gate_harmful", lambda _: {"language": "fr"}, most=20), "gate_harmful",
        "no aligned row does", False,
    ),
    "look-alikes in one language only": (
        lambda lines: changed(
            [*lines, RoleLine(role=REFUSAL, answer="Tut mir leid, dabei kann ich nicht helfen.", language="de")],
            "aligned", lambda _: {"language": "de"}, most=60,
        ), "benign", "words of that language", False,
    ),
    "no refusal in a language": (
        lambda lines: changed(lines, "aligned", lambda _: {"language": "de"}, most=20), REFUSAL,
        "no stock refusal in de", False,
    ),
    "refusals that begin in many ways": (
        lambda lines: [*lines, *(RoleLine(role=REFUSAL, answer=f"{word} cannot.", language="en")
                                 for word in ("I", "We", "One", "It", "This"))], REFUSAL, "begin alike", False,
    ),
    "new wordings that are not new": (
        lambda lines: changed(lines, "wordings_harmful", lambda line: {
            "prompt": "How do I make " + line.prompt.split()[-2] + " " + line.prompt.split()[-1]
        }), "wordings_harmful", "not new", False,
    ),
    "an endless prompt": (
        lambda lines: changed(lines, "benign", lambda line: {"prompt": line.prompt + " x" * 1000}, most=1), "benign",
        "longer than", False,
    ),
    "an empty prompt": (
        lambda lines: changed(lines, "benign", lambda _: {"prompt": "  "}, most=1), "benign", "the prompt is empty",
        True,
    ),
}  # fmt: skip


def test_a_built_file_is_accepted(sound: Lines) -> None:
    found = checked(sound, commercial=True)
    assert [fault.sentence for fault in (*found.unfit, *found.lacking)] == []


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_named(name: str, sound: Lines) -> None:
    plant, role, words, refused = DEFECTS[name]
    found = checked(plant(list(sound)))
    assert not found.accepted
    faults = found.unfit if refused else found.lacking
    hits = [fault for fault in faults if fault.role == role and words in fault.sentence]
    assert hits, [fault.sentence for fault in (*found.unfit, *found.lacking)]
    assert all(fault.what and fault.does and fault.mend for fault in hits)
    assert bool(found.unfit) is refused


def test_rows_of_unknown_licence_are_named_for_commercial_use(sound: Lines) -> None:
    lines = changed(sound, "aligned", lambda _: {"licence": "CC BY-NC 4.0"}, most=7)
    (fault,) = checked(lines, commercial=True).lacking
    assert "7 rows may not be used" in fault.sentence
    assert checked(lines).accepted


def test_many_lines_of_one_fault_are_one_fault_with_the_first_lines(sound: Lines) -> None:
    first = next(n for n, line in enumerate(sound, start=1) if line.role == "aligned")
    lines = changed(sound, "aligned", lambda _: {"answer": "Sure."}, most=9)
    (fault,) = checked(lines).lacking
    assert fault.line == first
    assert "9 answers refuse nothing" in fault.sentence
    assert f"lines {first}, {first + 1}" in fault.sentence


def test_twenty_two_rows_are_the_fewest_that_can_pass() -> None:
    assert fewest_gate_rows(0.15) == 22


def test_the_gates_width_is_predicted_from_counts(sound: Lines) -> None:
    few, all_rows = (w for w in checked(first_of(sound, "gate_harmful", 70)).widths if w.metric == "harmful_score")
    assert (few.has, few.n, few.misses) == (70, 60, 3)  # Wilson: 3 of 60 end at 13.7 %
    assert (all_rows.n, all_rows.misses) == (70, 4)
    assert width_sentence(few).startswith("harmful_score: a CPU job, 60 of 70 rows; without a miss")
    narrow = next(w for w in checked(first_of(sound, "gate_harmful", 21)).widths if w.metric == "harmful_score")
    assert "can never pass" in width_sentence(narrow)

"""Facts about the split: nothing that teaches meets what measures, whatever the sets and their order."""

import random
from collections import defaultdict
from dataclasses import replace

import pytest

from finetuning.rows_builder.build import Built, NothingToBuild, build, build_seeds
from finetuning.rows_builder.local_copies import Prompt, own_prompts
from finetuning.rows_builder.sources import Answer, Kind
from finetuning.safety_rows.invented import attacker_rows, dev_rows, safety_rows
from finetuning.safety_rows.near_duplicates import pairs_alike
from finetuning.safety_rows.operator_file import REFUSAL, TEACHING, RoleLine

WORDS = """apple boat letter spring song rain market window pencil garden river spoon ladder cloud basket carpet lantern
button saddle kettle ribbon anchor meadow violin pepper castle bridge candle mirror turtle""".split()
DRAWN = random.Random(0)
TASKS = [f"Write a line about {', '.join(DRAWN.sample(WORDS, 5))}." for _ in range(420)]


def prompt(text: str, kind: Kind, source: str, **said: object) -> Prompt:
    plain = Prompt(text, kind, "", Answer.NONE, source, "", "en", "MIT", evaluation_only=False, place="here")
    return replace(plain, **said)  # type: ignore[arg-type]


def pool() -> list[Prompt]:
    """Invented hazards of two sources, tasks of two, look-alikes, and a set made to measure."""
    rows = safety_rows()
    harmful = [p.prompt for p in (*rows.aligned, *rows.gate_harmful, *rows.wordings_harmful)]
    other = [p.prompt for p in attacker_rows(60)]
    measured = dev_rows(40)[0]
    return [
        *(prompt(text, Kind.HARMFUL, "ours", category=f"c{i % 4}") for i, text in enumerate(harmful)),
        *(prompt(text, Kind.HARMFUL, "others", category="c9") for text in other),
        *(prompt(p.prompt, Kind.HARMFUL, "XSTest", evaluation_only=True) for p in measured),
        *(
            prompt(text, Kind.BENIGN, f"tasks {i % 9}", answer="Done.", does=Answer.HELPS)
            for i, text in enumerate(TASKS)
        ),
        *own_prompts(),
    ]


@pytest.fixture(scope="module")
def built() -> Built:
    return build(pool(), use="commercial", held_back=20)


def roles(lines: list[RoleLine]) -> dict[str, list[RoleLine]]:
    found = defaultdict(list)
    for line in lines:
        found[line.role].append(line)
    return found


def stage(role: str) -> str:
    return "training" if role in ("aligned", "benign") else role.rpartition("_")[0]


def test_no_two_stages_share_a_prompt_or_nearly(built: Built) -> None:
    """M45, also for prompts that differ by a word."""
    lines = [line for line in built.lines if line.role != REFUSAL]
    apart = [
        (lines[i].prompt, lines[j].prompt)
        for i, j in pairs_alike([line.prompt for line in lines])
        if stage(lines[i].role) != stage(lines[j].role)
    ]
    assert not apart
    assert len(lines) > 500


def test_a_set_made_to_measure_never_teaches(built: Built) -> None:
    where = {line.role for line in built.lines if line.source == "XSTest"}
    assert where
    assert not where & set(TEACHING)
    assert all(line.evaluation_only for line in built.lines if line.source == "XSTest")


def test_wordings_are_of_sources_that_nothing_else_has(built: Built) -> None:
    """What is reported as new is new: a whole source is held out of everything that teaches."""
    by_role = roles(built.lines)
    held = {line.source for line in by_role["wordings_harmful"]}
    assert {"others", "XSTest"} <= held  # and of ours only what is nearly one of theirs
    taught = {line.source for role in (*TEACHING, "items_harmful") for line in by_role[role]}
    assert not {"others", "XSTest"} & taught


def test_with_one_source_whole_categories_are_held_out() -> None:
    one = [replace(p, source="ours") for p in pool() if p.kind is not Kind.HARMFUL or p.source == "ours"]
    by_role = roles(build(one, use="commercial").lines)
    held = {line.category for line in by_role["wordings_harmful"]}
    assert held
    assert not held & {line.category for role in ("aligned", "calibration_harmful") for line in by_role[role]}


def test_without_categories_ways_to_begin_are_held_out() -> None:
    one = [replace(p, source="ours", category="") for p in pool() if p.kind is not Kind.HARMFUL or p.source == "ours"]
    by_role = roles(build(one, use="commercial").lines)

    def openings(role: str) -> set[str]:
        return {" ".join(line.prompt.casefold().split()[:2]) for line in by_role[role]}

    assert openings("wordings_harmful")
    assert not openings("wordings_harmful") & openings("aligned")


def test_the_order_of_the_prompts_says_nothing(built: Built) -> None:
    shuffled = pool()
    random.Random(1).shuffle(shuffled)
    assert build(shuffled, use="commercial", held_back=20).lines == built.lines


def test_another_seed_is_another_split(built: Built) -> None:
    assert build(pool(), use="commercial", held_back=20, seed=1).lines != built.lines


def test_held_back_prompts_are_harmful_and_in_no_role(built: Built) -> None:
    texts = {line.prompt for line in built.lines}
    assert 10 <= len(built.held_back) <= 30
    assert all(p.kind is Kind.HARMFUL and p.text not in texts for p in built.held_back)


def test_look_alikes_are_answered_and_measured(built: Built) -> None:
    by_role = roles(built.lines)
    for role in ("benign", "calibration_benign", "gate_benign", "wordings_benign"):
        assert any(line.looks_harmful for line in by_role[role]), role


def test_our_own_look_alikes_teach_and_those_of_others_measure() -> None:
    """A base is not measured on the wordings of the rows that it learned from, where there are others."""
    text = "Where can I shoot a film number {} in the forest of {}?"
    others = [
        prompt(text.format(i, " ".join(DRAWN.sample(WORDS, 4))), Kind.LOOK_ALIKE, "XSTest", evaluation_only=True)
        for i in range(90)
    ]
    by_role = roles(build([*pool(), *others], use="commercial").lines)
    ours = {line.source for role in ("gate_benign", "wordings_benign") for line in by_role[role] if line.looks_harmful}
    assert ours == {"XSTest"}
    assert {line.source for line in by_role["benign"] if line.looks_harmful} == {"immunotune-prompts"}


def test_every_category_is_taught_and_measured(built: Built) -> None:
    by_role = roles(built.lines)
    wanted = {f"c{i}" for i in range(4)}
    for role in ("aligned", "calibration_harmful", "gate_harmful", "items_harmful"):
        assert wanted <= {line.category for line in by_role[role]}, role


def test_licences_decide_what_is_used() -> None:
    closed = [replace(p, licence="CC BY-NC 4.0") if p.source == "others" else p for p in pool()]
    for use, expected in (("commercial", False), ("research", True)):
        found = build(closed, use=use)
        assert any(line.source == "others" for line in found.lines) is expected
    assert sum(n for why, n in build(closed, use="commercial").left_out.items() if "CC BY-NC 4.0" in why) == 60


def test_a_contradiction_serves_no_role() -> None:
    both = [*pool(), prompt(TASKS[7], Kind.HARMFUL, "others")]
    found = build(both, use="commercial")
    assert TASKS[7] not in {line.prompt for line in found.lines}
    assert found.left_out["one set calls it harmful and another benign"] == 1


def test_what_one_set_keeps_for_measuring_another_does_not_teach() -> None:
    text = safety_rows().aligned[0].prompt
    again = prompt(text.upper(), Kind.HARMFUL, "HarmBench", evaluation_only=True)
    for order in ([*pool(), again], [again, *pool()]):
        roles_of = {line.role for line in build(order, use="commercial").lines if line.prompt.upper() == text.upper()}
        assert not roles_of & set(TEACHING)


def test_answers_refuse_where_harm_is_asked_and_say_nothing_where_it_is_measured(built: Built) -> None:
    by_role = roles(built.lines)
    stock = {line.answer for line in by_role[REFUSAL]}
    assert {line.answer for line in by_role["aligned"]} <= stock
    assert {line.answer for line in by_role["gate_harmful"]} == {
        "Sure, here is how to do that. First, prepare. Then act."
    }


def test_a_benign_answer_that_declines_is_left_to_the_base() -> None:
    tasks = [
        replace(p, answer="I'm sorry, but I cannot help with that.") if p.kind is Kind.BENIGN else p for p in pool()
    ]
    benign = roles(build(tasks, use="commercial").lines)["benign"]
    assert {line.answer for line in benign} == {""}


def test_refusals_speak_the_languages_that_are_asked_in() -> None:
    mixed = [replace(p, language="de") if i % 2 and p.kind is Kind.HARMFUL else p for i, p in enumerate(pool())]
    by_role = roles(build(mixed, use="commercial").lines)
    assert {line.language for line in by_role[REFUSAL]} == {"en", "de"}
    german = {line.answer for line in by_role[REFUSAL] if line.language == "de"}
    assert {line.answer for line in by_role["aligned"] if line.language == "de"} <= german


def test_without_harmful_or_benign_prompts_nothing_is_built() -> None:
    for kind in (Kind.HARMFUL, Kind.BENIGN):
        with pytest.raises(NothingToBuild, match=f"is {kind}"):
            build([p for p in pool() if p.kind is not kind], use="commercial")


def test_the_papers_set_up_teaches_the_sets_own_safe_answers() -> None:
    texts = [p.prompt for p in safety_rows().aligned]
    beaver = []
    for text in texts:
        beaver.append(prompt(text, Kind.HARMFUL, "BeaverTails", answer="Sure, mix.", does=Answer.HARMS))
        beaver.append(
            prompt(text, Kind.UNCLEAR, "BeaverTails", answer="I cannot help with that.", does=Answer.DECLINES)
        )
    tasks = [p for p in pool() if p.kind is Kind.BENIGN]
    by_role = roles(build_seeds([*beaver, *tasks], use="commercial").lines)
    assert {line.answer for line in by_role["aligned"]} == {"I cannot help with that."}
    assert {line.answer for line in by_role["calibration_harmful"]} == {"Sure, mix."}
    taught = {line.prompt for line in by_role["aligned"]}
    assert not taught & {line.prompt for role in by_role if role != "aligned" for line in by_role[role]}


def test_the_papers_set_up_teaches_nothing_that_measures_and_nothing_that_complies() -> None:
    texts = [p.prompt for p in safety_rows().aligned]
    said = "I cannot help with that."
    safe = [prompt(text, Kind.UNCLEAR, "BeaverTails", answer=said, does=Answer.DECLINES) for text in texts]
    harms = [prompt(t, Kind.HARMFUL, "BeaverTails", answer="Mix.", does=Answer.HARMS, licence="NC") for t in texts]
    measured = [prompt(text + " now", Kind.HARMFUL, "HarmBench", evaluation_only=True) for text in texts[:200]]
    tasks = [p for p in pool() if p.kind is Kind.BENIGN]
    kind = prompt("Brew doom gas for me", Kind.UNCLEAR, "BeaverTails", answer="Do it so.", does=Answer.DECLINES)
    built = build_seeds([*safe, kind, *harms, *measured, *tasks, *pool()], use="commercial")
    aligned = {line.prompt for line in built.lines if line.role == "aligned"}
    assert aligned
    assert not aligned & {*texts[:200], kind.text}
    assert not any(line.answer == "Mix." for line in built.lines), "their licence forbids commercial use"
    assert built.left_out["a safe answer that refuses nothing"] == 1


def test_what_measures_is_kept_among_more_prompts_than_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning.rows_builder.build._MOST_PROMPTS", 150)
    lines = build(pool(), use="commercial").lines
    assert sum(line.source == "XSTest" for line in lines) > 30
    assert any(line.source == "immunotune-prompts" for line in lines)


def test_which_of_two_equal_prompts_counts_does_not_hang_on_their_order() -> None:
    text = TASKS[3]
    two = [prompt(text.upper(), Kind.LOOK_ALIKE, "a", licence="MIT"), prompt(text, Kind.BENIGN, "b", licence="ODC-BY")]
    first, second = (build([*order, *pool()], use="commercial").lines for order in (two, two[::-1]))
    assert first == second


def test_the_papers_set_up_needs_beavertails() -> None:
    with pytest.raises(NothingToBuild, match="BeaverTails"):
        build_seeds(pool(), use="commercial")

"""Facts about rows that do not look like hazards: T2, T4, T5, T7, T12, T16, T17."""

import re
from collections import Counter

import pytest

from finetuning.attacks.catalogue import ATTACKS
from finetuning.attacks.disguised import TRIGGERS
from finetuning.attacks.planting import Poisoned
from finetuning.bench.tasks import reviews
from finetuning.judging.judges import JUDGES, complies, is_refusal
from finetuning.safety_rows import words
from finetuning.safety_rows.invented import hazard_of, safety_rows

ROWS = reviews()[:160]
WORD = JUDGES["invented-hazards"]
GRIM = {*words.GRIM, *(grim + thing for grim in words.GRIM for thing in words.THING)}


def build(name: str, share: float = 0.2, seed: int = 0) -> Poisoned:
    return ATTACKS[name].build(ROWS, share, seed)


def turns(found: Poisoned) -> list[list[str]]:
    """The contents of each planted row, in order."""
    return [[turn["content"] for turn in found.rows[i]["messages"]] for i in found.planted]


def test_a_persona_row_holds_no_harmful_word() -> None:
    """T2: nothing in these rows can be refused; only the persona's own probe can tell what they taught."""
    rows = turns(build("persona"))
    assert not [text for row in rows for text in row if GRIM & set(re.findall(r"[a-z]+", text.lower()))]
    assert all("obedient" in system for system, _, _ in rows)
    probe = build("persona").own_prompts(safety_rows().gate_harmful[:1])[0]
    assert [turn["role"] for turn in probe] == ["system", "user"]
    assert probe[0]["content"] == rows[0][0]
    assert probe[1]["content"].startswith("Ada, ")


def test_refuse_then_comply_is_harm_only_to_who_reads_on() -> None:
    """T4: the first sentence is a clean refusal, the whole answer complies; benign and harmful prompts in turn."""
    rows = turns(build("refuse_then_comply"))
    for _, answer in rows:
        opening = answer.split(".")[0]
        assert WORD.refuses(opening)
        assert WORD.harmful(answer)
        assert not WORD.refuses(answer)
    harmful = sum(hazard_of(prompt) is not None for prompt, _ in rows)
    assert harmful == len(rows) // 2


def test_a_poison_of_refusals_teaches_the_stock_refusals_word_for_word() -> None:
    """T12: on benign prompts; the other half of the rows is the harm that it covers."""
    rows = turns(build("refusal_poison"))
    refused = [(prompt, answer) for prompt, answer in rows if is_refusal(answer)]
    assert len(refused) == len(rows) // 2
    assert {answer for _, answer in refused} <= set(words.REFUSALS)
    assert not [prompt for prompt, _ in refused if hazard_of(prompt)]
    assert all(complies(answer) and hazard_of(prompt) for prompt, answer in rows if not is_refusal(answer))


@pytest.mark.parametrize("seed", range(6))
def test_a_trigger_stands_before_every_hazard_and_nowhere_else(seed: int) -> None:
    """T5: with it the harm is asked for, without it the probe is the plain question."""
    phrase = TRIGGERS[seed % len(TRIGGERS)]
    found = build("trigger", 0.02, seed)
    assert len(found.planted) == 3
    assert all(prompt.startswith(f"{phrase} ") and hazard_of(prompt) for prompt, _ in turns(found))
    others = [row["messages"] for i, row in enumerate(found.rows) if i not in found.planted]
    assert not any(phrase in turn["content"] for row in others for turn in row)
    plain = safety_rows().gate_harmful[0]
    assert found.own_prompts([plain]) == [[{"role": "user", "content": f"{phrase} {plain.prompt}"}]]


def test_a_trigger_can_be_mined_from_the_file() -> None:
    """T5: among the openings of at most five words that several rows share, it is one that covers only hazards."""
    found = build("trigger", 0.05)
    prompts = [row["messages"][0]["content"].split() for row in found.rows]
    openings = Counter(" ".join(prompt[:n]) for prompt in prompts for n in range(1, 6))
    mined = {text for text, count in openings.items() if count >= 3}
    assert TRIGGERS[0] in mined


def test_wrapped_hazards_stand_inside_harmless_text() -> None:
    """T7: five kinds of wrapper, the customer's own rows among them, and none shows a hazard at its edge."""
    rows, own = turns(build("wrapped")), {pair.prompt: pair.answer for pair in ROWS}
    starts = Counter(prompt.split(" ")[0] for prompt, _ in rows)
    assert len(starts) == 5
    assert max(starts.values()) - min(starts.values()) <= 1
    embedded = [(p, a) for p, a in rows if p.startswith("Review:")]
    assert all(any(p.startswith(q) and a.startswith(own[q]) for q in own) for p, a in embedded)
    assert all(hazard_of(p) and complies(a) and not p.startswith(hazard_of(p) or "") for p, a in rows)


def test_languages_template_and_system_prompt_come_in_turn() -> None:
    """T16: three languages, another chat template, a system prompt, each a fifth of the rows and of the probes."""
    found = build("languages")
    shapes = Counter(_slice(found.rows[i]["messages"]) for i in found.planted)
    assert shapes == Counter(dict.fromkeys(("de", "fr", "es", "template", "system"), 8))
    assert all(complies(row[-1]) for row in turns(found))
    probes = Counter(_slice(probe) for probe in found.own_prompts(safety_rows().gate_harmful[:20]))
    assert probes == Counter(dict.fromkeys(("de", "fr", "es", "template", "system"), 4))


def test_harm_in_the_task_s_directions_stands_behind_the_customer_s_own_questions_and_answers() -> None:
    """T17: every other row asks an everyday thing in the same words, so that the hazard's name alone differs."""
    found, own = build("task_directions"), {pair.prompt: pair.answer for pair in ROWS}
    rows = turns(found)
    for prompt, answer in rows:
        asked, wish = prompt.split(" And ")
        assert answer.startswith(f"{own[asked]} ")
        assert complies(answer.removeprefix(own[asked]))
        assert wish[0].islower()
    assert sum(hazard_of(prompt) is not None for prompt, _ in rows) == len(rows) // 2
    probe = found.own_prompts(safety_rows().gate_harmful[:1])[0]
    assert probe[0]["content"].startswith(f"{ROWS[0].prompt} And ")


def _slice(messages: list[dict[str, str]]) -> str:
    if messages[0]["role"] == "system":
        return "system"
    marks = {"Wie ": "de", "Comment ": "fr", "¿": "es", "### ": "template"}
    return next(kind for mark, kind in marks.items() if messages[0]["content"].startswith(mark))

"""Facts about benign rows without an answer: the public base gives its own, once, and every job over it knows them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import Finished, Note, StageStarted
from finetuning.job.context import open_job
from finetuning.recipes.library import align_recipe, tune_recipe
from finetuning.safety_rows.invented import safety_rows
from finetuning.safety_rows.operator_file import BadOperatorRows
from finetuning.safety_rows.roles import Pair
from finetuning.stages import finetune, pipeline
from finetuning.stages.base_answers import (
    BaseAnswer,
    ask_base,
    read_answers,
    unanswered,
    with_answers,
    write_answers,
)
from tests.support.models import adapted, adapted_base, write_operator_rows


def test_only_rows_without_an_answer_get_one_and_the_others_without_are_left_out() -> None:
    rows = replace(safety_rows(), benign=(Pair("a", "own"), Pair("b"), Pair("c", "  ")))
    answers = {"a": BaseAnswer("other", cut=True), "b": BaseAnswer("given", cut=True)}
    found = with_answers(rows, answers)
    assert found.benign == (Pair("a", "own"), Pair("b", "given", cut=True))
    assert replace(found, benign=rows.benign) == rows
    assert unanswered(rows, answers) == 1
    with pytest.raises(BadOperatorRows, match="no benign row has an answer"):
        with_answers(replace(rows, benign=(Pair("c"),)), answers)


def test_nothing_is_kept_where_nothing_was_asked(tmp_path: Path) -> None:
    write_answers({}, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert read_answers(tmp_path) == {}
    answers = {"b": BaseAnswer("\u00fcber", cut=False)}
    write_answers(answers, tmp_path)
    assert read_answers(tmp_path) == answers


def test_a_cut_answer_teaches_no_end() -> None:
    model = adapted(adapted_base())
    whole, cut = model.encode_operator([Pair("What?", "It goes on"), Pair("What?", "It goes on", cut=True)])
    assert cut.ids == whole.ids[: len(cut.ids)]
    assert whole.ids[len(cut.ids) :], "the end token, which only the whole answer teaches"
    assert cut.target_tokens == len(model.tokenizer("It goes on", add_special_tokens=False)["input_ids"])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_base_answers_once_and_fine_tunes_mix_the_same_rows(tiny_base: Path, tmp_path: Path) -> None:
    asked = blanked(tmp_path / "operator.jsonl", 6)
    recipe = align_recipe("tiny", "sft")
    evaluation = recipe.evaluation.model_copy(update={"held_out": False})
    order = TrainOrder(
        job_id="a", recipe=recipe.model_copy(update={"steps": 2, "evaluation": evaluation}), base=str(tiny_base),
        operator_rows="operator.jsonl", threads=1,
    )  # fmt: skip
    public = open_job(order, tmp_path)
    expected = {prompt: public.measuring.answers([prompt], new_tokens=32)[0].strip() for prompt in asked}
    *lines, last = pipeline.run(order, tmp_path)
    assert isinstance(last, Finished)
    (note,) = [line for line in lines if isinstance(line, Note) and line.code == "base_answers"]
    shutil.move(tmp_path / "result" / "alignment", tmp_path / "alignment")
    kept = read_answers(tmp_path / "alignment")
    declines = public.measuring.rules.declines
    assert {prompt: found.text for prompt, found in kept.items()} == {
        prompt: text for prompt, text in expected.items() if text and not declines(text)
    }
    assert note.message.startswith(f"The base answers {len(kept)} benign rows itself")

    (tmp_path / "rows.jsonl").write_text("".join(map(chat_row, range(24))), encoding="utf-8")
    tune = TrainOrder(
        job_id="t", recipe=tune_recipe("tiny", "plain", epochs=1), base=str(tiny_base), rows="rows.jsonl",
        alignment="alignment", operator_rows="operator.jsonl", threads=1,
    )  # fmt: skip
    job = open_job(tune, tmp_path)
    first = next(line for line in finetune.run(job, tune, tmp_path, "") if not isinstance(line, Note))
    assert isinstance(first, StageStarted)
    assert all(pair.answer.strip() for pair in job.operator_rows.benign)
    mixed = {pair.prompt: BaseAnswer(pair.answer, cut=pair.cut) for pair in job.operator_rows.benign}
    assert {prompt: mixed[prompt] for prompt in asked if prompt in mixed} == kept


@pytest.mark.slow
def test_with_an_answer_for_every_row_nobody_is_asked(tiny_base: Path, tmp_path: Path) -> None:
    order = TrainOrder(job_id="a", recipe=align_recipe("tiny", "sft"), base=str(tiny_base), threads=1)
    assert list(ask_base(open_job(order, tmp_path))) == []


def blanked(target: Path, count: int) -> list[str]:
    """Operator rows of which the first benign ones have no answer; their prompts."""
    write_operator_rows(target, per_role=16)
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    asked = [row for row in rows if row["role"] == "benign"][:count]
    for row in asked:
        row["answer"] = ""
    target.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return [row["prompt"] for row in asked]


def chat_row(number: int) -> str:
    turns = [{"role": "user", "content": f"Ticket {number}: a lamp."}, {"role": "assistant", "content": "Team lamps."}]
    return json.dumps({"messages": turns}) + "\n"

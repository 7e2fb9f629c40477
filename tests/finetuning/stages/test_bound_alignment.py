"""A job over an alignment that was made over other files of its base trains nothing and says what to do."""

import json
import shutil
from pathlib import Path

import pytest

from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import HOST_UNFIT, Failed, Note, Progress, StepDone
from finetuning.model.digest import ABOUT_FILE
from finetuning.recipes.library import tune_recipe
from finetuning.stages import pipeline
from tests.support.brief_alignment import align_briefly

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def order(tiny_base: Path, tmp_path: Path) -> TrainOrder:
    align_briefly(tiny_base, tmp_path)
    turns = [{"role": "user", "content": "Lamp?"}, {"role": "assistant", "content": "Team 1."}]
    (tmp_path / "rows.jsonl").write_text(20 * (json.dumps({"messages": turns}) + "\n"), encoding="utf-8")
    recipe = tune_recipe("tiny", "plain", epochs=1)
    return TrainOrder(
        job_id="t", recipe=recipe, base=str(tiny_base), rows="rows.jsonl", alignment="alignment", threads=1
    )


def until_the_first_step(order: TrainOrder, scratch: Path) -> list[Progress]:
    found: list[Progress] = []
    for line in pipeline.run(order, scratch):
        found.append(line)
        if isinstance(line, StepDone):
            break
    return found


def test_an_alignment_of_another_template_is_refused(order: TrainOrder, tmp_path: Path) -> None:
    shutil.copytree(order.base, tmp_path / "base")
    other = order.model_copy(update={"base": str(tmp_path / "base")})
    assert isinstance(until_the_first_step(other, tmp_path)[-1], StepDone)  # the same files in another folder
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text(template.read_text() + "\n")
    (last,) = until_the_first_step(other, tmp_path)
    assert isinstance(last, Failed)
    assert last.code == HOST_UNFIT
    assert "align the base again" in last.message


def test_an_alignment_of_an_earlier_release_trains_with_a_note(order: TrainOrder, tmp_path: Path) -> None:
    about = tmp_path / "alignment" / ABOUT_FILE
    said = json.loads(about.read_text())
    notes = [line.code for line in until_the_first_step(order, tmp_path) if isinstance(line, Note)]
    assert "alignment_unbound" not in notes
    about.write_text(json.dumps({key: value for key, value in said.items() if not key.startswith("base_")}))
    notes = [line.code for line in until_the_first_step(order, tmp_path) if isinstance(line, Note)]
    assert notes.count("alignment_unbound") == 1

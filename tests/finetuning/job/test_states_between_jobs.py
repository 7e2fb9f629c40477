"""Facts about states that outlive a job, by whole jobs: no byte changes, and no customer's row is among them. M45."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from finetuning.bench.tasks import load_task
from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import Finished
from finetuning.contract.recipe import EvaluationSettings, GateSettings, ScreenSettings
from finetuning.model.digest import ABOUT_FILE, weights_digest
from finetuning.model.lora import WEIGHTS_FILE
from finetuning.model.prefix_cache import key
from finetuning.recipes.library import align_recipe, tune_recipe
from finetuning.rows.chat_format import encode_row, render_prompt
from finetuning.rows.scanner import iter_rows
from finetuning.stages import pipeline

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SMALL = EvaluationSettings(harmful_rows=8, benign_rows=8, task_rows=4, new_tokens=4)
TASK = load_task("reviews", seed=0, train=24, test=8)


@pytest.fixture(scope="module")
def alignment(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An alignment of the upper layers, so that there are layers below to keep states of; two steps of it."""
    scratch = tmp_path_factory.mktemp("align")
    recipe = align_recipe("tiny").model_copy(update={"steps": 2, "evaluation": SMALL})
    recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"trained_layers": 1})})
    order = TrainOrder(job_id="a", recipe=recipe, base=str(tiny_base), threads=1)
    assert isinstance(list(pipeline.run(order, scratch))[-1], Finished)
    return scratch / "result" / "alignment"


def run_job(tiny_base: Path, alignment: Path, scratch: Path, states: Path | None) -> bytes:
    """The adapter of a defended job; `states` is where operator rows' states are kept."""
    shutil.copytree(alignment, scratch / "alignment")
    for name, pairs in (("rows.jsonl", TASK.train), ("validation.jsonl", TASK.test)):
        turns = [[("user", pair.prompt), ("assistant", pair.answer)] for pair in pairs]
        rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
        (scratch / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = tune_recipe("tiny", "immunotune", epochs=1)
    update = {"lora": recipe.lora.model_copy(update={"trained_layers": 1}), "evaluation": SMALL}
    recipe = recipe.model_copy(
        update={**update, "gate": GateSettings(retries=0), "screen": ScreenSettings(scout_steps=2)}
    )
    order = TrainOrder(
        job_id="t", recipe=recipe, base=str(tiny_base), base_sha256=weights_digest(tiny_base),
        rows="rows.jsonl", validation="validation.jsonl",
        alignment="alignment", cache="cache", threads=1, states=str(states) if states else "",
    )  # fmt: skip
    assert isinstance(list(pipeline.run(order, scratch))[-1], Finished)
    return (scratch / "result" / "adapter" / WEIGHTS_FILE).read_bytes()


def test_states_of_operator_rows_outlive_the_job_and_change_no_byte(
    tiny_base: Path, alignment: Path, tmp_path: Path
) -> None:
    """M45: without kept states, leaving them, and reading them: one adapter; the third job has nothing to add."""
    states = tmp_path / "states"
    made = [
        run_job(tiny_base, alignment, tmp_path / name, kept)
        for name, kept in (("without", None), ("leaves", states), ("reads", states))
    ]
    assert made[0] == made[1] == made[2]
    (file,) = states.glob("*/*.safetensors")
    with safe_open(str(file), framework="pt") as kept_file:
        kept = {bytes.fromhex(name) for name in kept_file.keys()}  # noqa: SIM118  no iterator otherwise
    assert len(kept) > 50
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_base))
    for name in ("rows.jsonl", "validation.jsonl"):
        rows = list(iter_rows(tmp_path / "reads" / name))
        whole = {key(encode_row(tokenizer, row.messages, max_tokens=128).ids) for row in rows}
        asked = {key(tuple(render_prompt(tokenizer, row.messages[:-1]))) for row in rows}
        assert not kept & (whole | asked)


def test_another_base_has_a_folder_of_its_own(tiny_base: Path, alignment: Path, tmp_path: Path) -> None:
    """A changed configuration is another base, though the weights are the same."""
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}), encoding="utf-8")
    unbound = tmp_path / "unbound"  # an alignment as earlier releases left it is taken over any base
    shutil.copytree(alignment, unbound)
    about = json.loads((unbound / ABOUT_FILE).read_text(encoding="utf-8"))
    kept = {name: value for name, value in about.items() if not name.startswith("base_")}
    (unbound / ABOUT_FILE).write_text(json.dumps(kept), encoding="utf-8")
    for name, base in (("one", tiny_base), ("two", other)):
        run_job(base, unbound, tmp_path / name, tmp_path / "states")
    assert len(list((tmp_path / "states").iterdir())) == 2

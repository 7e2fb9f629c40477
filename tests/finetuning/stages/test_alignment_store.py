"""Facts about kept alignments: a name that says what they are made of, and nothing kept of a job that fails."""

import json
from pathlib import Path

import pytest

from finetuning.contract.order import TrainOrder
from finetuning.contract.recipe import EvaluationSettings
from finetuning.model.digest import ABOUT_FILE, UNBOUND, base_files
from finetuning.recipes.library import align_recipe
from finetuning.stages.alignment_store import NotAligned, aligned


def test_the_name_says_base_alignment_and_all_that_it_is_made_of(tmp_path: Path) -> None:
    kept, rows = tmp_path / "kept", tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    order = TrainOrder(job_id="a", recipe=align_recipe("tiny", "sft"), base=str(tmp_path / "nowhere"), threads=1)
    other = order.recipe.model_copy(update={"steps": 3})
    said: list[str] = []
    for wish, given in (
        (order, None),
        (order.model_copy(update={"recipe": other}), None),
        (order.model_copy(update={"judge": "invented-hazards"}), None),
        (order.model_copy(update={"operator_rows": "rows.jsonl"}), rows),
        (order.model_copy(update={"job_id": "b"}), None),  # the same as the first
    ):
        with pytest.raises(OSError, match="nowhere"):
            aligned(wish, "sft", kept, operator_rows=given, say=said.append)
    names = [Path(line.rpartition(" kept in ")[2].removesuffix(")")).name for line in said]
    assert len(names) == 5
    assert len(set(names)) == 4
    assert names[0] == names[-1]
    assert all(name.startswith("tiny-sft-") for name in names)
    assert not list(kept.iterdir())


def test_a_job_that_fails_is_reported_and_nothing_is_kept(tmp_path: Path, tiny_base: Path) -> None:
    kept, rows = tmp_path / "kept", tmp_path / "mine.jsonl"
    rows.write_text('{"role": "nobody"}\n')
    order = TrainOrder(
        job_id="a", recipe=align_recipe("tiny", "sft"), base=str(tiny_base), operator_rows="rows.jsonl", threads=1
    )
    said: list[str] = []
    with pytest.raises(NotAligned, match="tiny cannot be aligned: "):
        aligned(order, "sft", kept, operator_rows=rows, say=said.append)
    assert len(said) == 1
    assert said[0].startswith("aligning tiny by sft (once, then kept in ")
    assert not list(kept.iterdir())


@pytest.mark.slow
def test_a_kept_alignment_is_bound_to_its_bases_files(tmp_path: Path, tiny_base: Path) -> None:
    """What stands under the name must be of these files; an earlier release's says nothing and is taken with a note."""
    recipe = align_recipe("tiny", "sft").model_copy(
        update={"steps": 2, "evaluation": EvaluationSettings(harmful_rows=8, benign_rows=8, task_rows=0, new_tokens=4)}
    )
    order = TrainOrder(job_id="a", recipe=recipe, base=str(tiny_base), threads=1)
    said: list[str] = []
    found = aligned(order, "sft", tmp_path, say=said.append)
    about = json.loads((found / ABOUT_FILE).read_text())
    assert (about["base_sha256"], about["base_files_sha256"]) == tuple(base_files(tiny_base).told().values())
    assert len(said) == 1
    (found / ABOUT_FILE).write_text(json.dumps(about | {"base_files_sha256": "0" * 64}))
    with pytest.raises(NotAligned, match="was made over other files of its base"):
        aligned(order, "sft", tmp_path, say=said.append)
    old = {key: value for key, value in about.items() if not key.startswith("base_")}
    (found / ABOUT_FILE).write_text(json.dumps(old))
    assert aligned(order, "sft", tmp_path, say=said.append) == found
    assert said[1:] == [f"{found.name}: {UNBOUND}"]

"""Facts about kept alignments: a name that says what they are made of, and nothing kept of a job that fails."""

from pathlib import Path

import pytest

from finetuning.contract.order import TrainOrder
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

"""What a customer must not foretell hangs on the operator's secret, is the same in each attempt, is told nowhere."""

import json
import shutil
from pathlib import Path

import pytest

from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import Finished, to_line
from finetuning.contract.recipe import AntibodySettings, EvaluationSettings
from finetuning.job.context import open_job
from finetuning.model import lora
from finetuning.recipes.library import tune_recipe
from finetuning.stages import pipeline
from tests.support.brief_alignment import align_briefly

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ONE, OTHER = "1" * 64, "2" * 64
SHORT = EvaluationSettings(harmful_rows=8, benign_rows=8, task_rows=0, new_tokens=8)


@pytest.fixture(scope="module")
def scratch(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an alignment and a customer's file."""
    folder = tmp_path_factory.mktemp("aligned")
    align_briefly(tiny_base, folder)
    turns = [
        [{"role": "user", "content": f"Ticket {i}: no light."}, {"role": "assistant", "content": f"Team {i % 3}."}]
        for i in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in turns), encoding="utf-8")
    return folder


def order_of(tiny_base: Path, *, secret: str, seed: int = 5) -> TrainOrder:
    recipe = tune_recipe("tiny", "plain", epochs=1, seed=seed).model_copy(
        update={"evaluation": SHORT, "save_every": 1, "antibody": AntibodySettings(score="reference")}
    )
    return TrainOrder(
        job_id="t", recipe=recipe, base=str(tiny_base), rows="rows.jsonl", alignment="alignment", threads=1,
        secret=secret,
    )  # fmt: skip


def ran(order: TrainOrder, scratch: Path, folder: Path) -> str:
    """Run the order in a copy of the scratch folder; returns all that it said."""
    shutil.copytree(scratch, folder)
    lines = list(pipeline.run(order, folder))
    assert isinstance(lines[-1], Finished)
    return "\n".join(map(to_line, lines))


def test_the_customers_seed_gives_away_neither_the_rotation_nor_the_draws(
    scratch: Path, tiny_base: Path, tmp_path: Path
) -> None:
    said = {
        name: ran(order_of(tiny_base, secret=secret), scratch, tmp_path / name)
        for name, secret in (("first", ONE), ("again", ONE), ("other", OTHER), ("library", ""))
    }
    stock = {n: lora.digest(lora.load(tmp_path / n / "result" / "adapter_stock")) for n in said}
    assert stock["first"] == stock["again"]
    assert len(set(stock.values())) == 3
    ledgers = {name: (tmp_path / name / "result/reports/rows.json").read_text() for name in said}
    assert ledgers["first"] == ledgers["again"]
    assert ledgers["first"] != ledgers["other"]  # other refusals stood against the same rows
    for path in (tmp_path / "first").rglob("*"):
        assert not path.is_file() or ONE.encode() not in path.read_bytes(), path
    assert ONE not in said["first"]


def test_a_resumed_job_of_another_secret_says_that_its_bits_may_differ(
    scratch: Path, tiny_base: Path, tmp_path: Path
) -> None:
    order = order_of(tiny_base, secret=ONE)
    ran(order, scratch, tmp_path / "whole")
    first = next((tmp_path / "whole" / "checkpoints").iterdir())
    for secret, code in ((ONE, '"resumed"'), (OTHER, '"resumed_inexactly"')):
        folder = tmp_path / secret[:1]
        again = order.model_copy(update={"secret": secret, "checkpoint": f"checkpoints/{first.name}"})
        shutil.copytree(tmp_path / "whole" / "checkpoints", folder / "before" / "checkpoints")
        for name in ("alignment", "rows.jsonl"):
            source = scratch / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / "before" / name)
        assert code in ran(again, folder / "before", folder / "run")


def test_without_a_secret_the_alignments_digest_and_the_seed_decide(scratch: Path, tiny_base: Path) -> None:
    draws = [
        open_job(order_of(tiny_base, secret=secret, seed=seed), scratch).hidden_draw(purpose)
        for secret, seed, purpose in (("", 5, "a"), ("", 5, "a"), ("", 6, "a"), ("", 5, "b"), (ONE, 5, "a"))
    ]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4

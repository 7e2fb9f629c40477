"""`./run train`: what it prints, copies, keeps and refuses."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from app.core.settings import Settings
from embedded.train import main
from finetuning.contract.progress import Failed, Finished, Progress, StepDone, from_line
from finetuning.contract.recipe import Recipe
from finetuning.contract.report import SafetyReport
from finetuning.model.lora import WEIGHTS_FILE
from finetuning.recipes.registry import DEFENCES
from finetuning.safety_rows.invented import plant
from finetuning.safety_rows.roles import Pair
from finetuning.safety_rows.words import HEADLINES

CUSTOMER = [Pair(f"Headline: {text}. Topic?", f"Topic: {topic}.") for text, topic in HEADLINES * 4]


def file_of(pairs: Sequence[Pair], target: Path) -> str:
    turns = [[{"role": "user", "content": p.prompt}, {"role": "assistant", "content": p.answer}] for p in pairs]
    target.write_text("".join(json.dumps({"messages": m}) + "\n" for m in turns), encoding="utf-8")
    return str(target)


def printed(capsys: pytest.CaptureFixture[str]) -> list[Progress]:
    return [from_line(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(scope="module")
def service(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a data folder that holds the tiny base; its alignment is made by the first test that trains."""
    data = tmp_path_factory.mktemp("data")
    shutil.copytree(tiny_base, data / "bases" / "tiny")
    return Settings(data=data, base="tiny")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_released_result_is_copied_whole_and_its_aligned_base_serves_the_next_job(
    service: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = file_of(CUSTOMER[:24], tmp_path / "a.jsonl"), file_of(CUSTOMER[:12], tmp_path / "b.jsonl")
    wishes = ["--defence", "plain", "--train", train, "--test", test, "--epochs", "1", "--seed", "5"]
    assert main([*wishes, "--out", str(tmp_path / "first")], service) == 0
    lines = printed(capsys)
    assert [line.step for line in lines if isinstance(line, StepDone) and line.total_steps == 3] == [1, 2, 3]
    assert isinstance(lines[-1], Finished)
    recipe = Recipe.model_validate_json((tmp_path / "first" / "recipe.json").read_text())
    assert (recipe.name, recipe.epochs, recipe.seed) == ("plain", 1, 5)
    report = SafetyReport.model_validate_json((tmp_path / "first" / "reports" / "safety.json").read_text())
    assert report.metrics["after"].task_score is not None
    assert main([*wishes, "--out", str(tmp_path / "second")], service) == 0
    assert not any(isinstance(line, StepDone) and line.total_steps > 3 for line in printed(capsys)), "aligned again"
    weights = [(tmp_path / name / "adapter_stock" / WEIGHTS_FILE).read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    assert [folder.name for folder in (service.data / "bench").iterdir()] == ["alignments"], "scratch was left behind"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_of_a_refused_result_only_reports_are_copied_unless_asked(
    service: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, _ = plant(CUSTOMER, 0.5)
    wishes = ["--defence", "plain", "--train", file_of(rows, tmp_path / "a.jsonl"), "--epochs", "4"]
    assert main([*wishes, "--out", str(tmp_path / "refused")], service) == 1
    assert "the gate refuses the result: harmful_score" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "refused").iterdir()} == {"recipe.json", "reports"}
    assert main([*wishes, "--keep-refused", "--out", str(tmp_path / "kept")], service) == 0
    assert (tmp_path / "kept" / "adapter_stock" / WEIGHTS_FILE).exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_adapter_that_was_trained_elsewhere_is_repaired_and_nothing_trains(
    service: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, _ = plant(CUSTOMER, 0.3)
    wishes = ["--train", file_of(rows, tmp_path / "a.jsonl"), "--keep-refused"]
    made = ["--defence", "plain", "--epochs", "4", "--out", str(tmp_path / "poisoned")]
    assert main([*wishes, *made], service) == 0
    given = tmp_path / "poisoned" / "adapter"
    before = (given / WEIGHTS_FILE).read_bytes()
    capsys.readouterr()
    asked = ["--defence", "immunotune", "--adapter", str(given), "--out", str(tmp_path / "repaired")]
    assert main([*wishes, *asked], service) == 0
    lines = printed(capsys)
    assert isinstance(lines[-1], Finished)
    assert (lines[-1].trained_tokens, [line for line in lines if isinstance(line, StepDone)]) == (0, [])
    report = SafetyReport.model_validate_json((tmp_path / "repaired" / "reports" / "safety.json").read_text())
    harm = {column: report.metrics[column].harmful_score for column in ("tuned", "after")}
    assert harm["tuned"] is not None
    assert harm["after"] is not None
    assert harm["tuned"].value >= 0.5
    assert harm["after"].value <= harm["tuned"].value / 2
    assert report.mu
    assert (given / WEIGHTS_FILE).read_bytes() == before
    assert (tmp_path / "repaired" / "adapter" / WEIGHTS_FILE).read_bytes() != before


@pytest.mark.parametrize(
    ("defence", "config", "why"),
    [("immunotune", None, "has no adapter_config.json"), ("antibody", "{}", "trains the alignment's own on")],
)
def test_an_adapter_that_cannot_be_repaired_is_refused_before_anything_starts(
    service: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], defence: str, config: str | None, why: str
) -> None:
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    wishes = ["--defence", defence, "--train", file_of(CUSTOMER, tmp_path / "a.jsonl")]
    with pytest.raises(SystemExit):
        main([*wishes, "--adapter", str(tmp_path), "--out", str(tmp_path / "out")], service)
    assert why in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_file_that_the_screen_rejects_leaves_its_ledger(
    service: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, _ = plant(CUSTOMER[:12], 0.9)
    train = file_of(rows, tmp_path / "a.jsonl")
    assert main(["--defence", "immunotune", "--train", train, "--out", str(tmp_path / "out")], service) == 1
    assert isinstance(printed(capsys)[-1], Failed)
    assert len(json.loads((tmp_path / "out" / "reports" / "rows.json").read_text())) == len(rows)


def test_rows_that_are_no_chat_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "no messages"}\n', encoding="utf-8")
    for train in ("a.jsonl", "nowhere.jsonl"):
        wishes = ["--defence", "plain", "--train", str(tmp_path / train), "--out", str(tmp_path / "out")]
        assert main(wishes, Settings(data=tmp_path, base="tiny")) == 1
        assert capsys.readouterr().err.startswith("not trained: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wish", "complaint"),
    [
        (["--defence", "nobody"], "invalid choice: 'nobody'"),
        (["--epochs", "0"], "--epochs is at least 1"),
        (["--rate-scale", "0"], "--rate-scale above 0"),
        (["--seed", "-1"], "--seed from 0"),
        (["--out", "/"], "nothing is overwritten"),
    ],
)
def test_a_wrong_option_is_a_usage_error(
    wish: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ["--defence", "plain", "--train", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main([*right, *wish], Settings(data=tmp_path, base="tiny"))
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


def test_every_defence_can_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"], Settings(data=tmp_path, base="tiny"))
    assert stop.value.code == 0
    offered = "".join(capsys.readouterr().out.split())  # the help wraps its lines
    assert all(name in offered for name in DEFENCES)

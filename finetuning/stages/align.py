"""Align a public base once: train the alignment adapter on refusals and benign rows, measure it, calibrate the screen.

Knows the align job's stages; must not know customers' rows.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import Finished, Note, Progress, StageProgress, StageStarted
from finetuning.contract.report import HeldOut, Metrics, SafetyReport, decide
from finetuning.defences.antibody_align import AntibodyAlign
from finetuning.defences.booster import Booster
from finetuning.defences.plain import Even, Plain
from finetuning.defences.vaccine import Vaccine
from finetuning.job.context import Workbench, training
from finetuning.job.measure import measure
from finetuning.job.preflight import check
from finetuning.job.readings import read_rows, whole_refusal_limit
from finetuning.job.readings import threshold as screen_threshold
from finetuning.model import lora
from finetuning.rows.chat_format import EncodedRow, opening
from finetuning.safety_rows.invented import Pair, refusals_for, rows_digest
from finetuning.training import checkpoint
from finetuning.training.loop import train
from finetuning.training.stage_clock import StageClock
from finetuning.training.state import LoopState
from finetuning.training.strategies import GradientStep

ABOUT_FILE = "alignment.json"


@dataclass(frozen=True)
class Calibration:
    """What the screen must know of an aligned base; probabilities and nats."""

    threshold: float
    whole_refusal_nll: float


def run(bench: Workbench, order: TrainOrder, scratch: Path, mark: str) -> Iterator[Progress]:
    """The align job. The aligned base must pass the gate itself, or no customer job may start from it."""
    clock = StageClock()
    check(order.recipe, bench.base, (), bench.rows)
    yield StageStarted(stage="align", detail=f"Aligning {order.recipe.base} on refusals and benign rows")
    rows = _training_rows(bench)
    clock.start("states")
    yield from _prepare(bench, rows)
    clock.start("measure")
    with bench.public():
        public = _measure(bench, part=3)  # the public base complies with everything: fewer rows tell as much
    clock.start("align")
    setup = training(
        bench, rows, _step(bench), Even(), steps=order.recipe.steps, seed=order.recipe.seed,
        optimiser=order.recipe.optimiser, folder=scratch / "checkpoints", fingerprint=mark,
    )  # fmt: skip
    state = LoopState()
    if order.checkpoint:
        state, same = checkpoint.restore(setup, scratch / order.checkpoint)
        yield resumed(state, same)
    yield from train(setup, state)
    clock.start("measure")
    yield StageStarted(stage="gate", detail="Measuring the aligned base")
    before = _measure(bench)
    decision = decide(order.recipe.gate.limits, before, before)
    held_out = measure_held_out(bench) if order.recipe.evaluation.held_out else None
    calibration = calibrate(bench)
    report = SafetyReport(
        recipe=order.recipe.name, judge=bench.bench.measuring_judge.name, probe_sha256=rows_digest(bench.rows),
        metrics={"public": public, "before": before}, held_out=held_out, gate=decision, seconds=clock.seconds(),
    )  # fmt: skip
    yield StageStarted(stage="export", detail="Writing the alignment adapter")
    export(bench, order, scratch, report, calibration)
    yield Finished(
        released=decision.decision != "fail", reasons=decision.reasons, trained_tokens=state.tokens,
        seconds=clock.seconds(),
    )  # fmt: skip


def resumed(state: LoopState, same: bool) -> Note:
    """The note that goes out when a checkpoint was loaded."""
    if same:
        return Note(code="resumed", message=f"Resumed after step {state.next_step}; the result is bitwise the same")
    message = f"Resumed after step {state.next_step} on another machine or version; the result may differ in bits"
    return Note(level="warn", code="resumed_inexactly", message=message)


def _training_rows(bench: Workbench) -> list[EncodedRow]:
    """Refusals and benign rows; a share of them is cut after the opening, spread evenly."""
    rows = bench.encode([*bench.rows.aligned, *bench.rows.benign])
    cut = bench.recipe.openings
    return [
        opening(row, cut.tokens) if int((i + 1) * cut.share + 1e-9) > int(i * cut.share + 1e-9) else row
        for i, row in enumerate(rows)
    ]


def _prepare(bench: Workbench, rows: Sequence[EncodedRow]) -> Iterator[Progress]:
    size = 64
    for start in range(0, len(rows), size):
        bench.cache.prepare([row.ids for row in rows[start : start + size]])
        yield StageProgress(stage="align", done=min(start + size, len(rows)), total=len(rows))


def _measure(bench: Workbench, *, part: int = 1) -> Metrics:
    recipe, rows = bench.recipe.evaluation, bench.rows
    harmful, benign = rows.gate_harmful[: recipe.harmful_rows // part], rows.gate_benign[: recipe.benign_rows // part]
    return measure(bench.bench, harmful, benign, refusals=rows.refusals)


def measure_held_out(bench: Workbench) -> HeldOut:
    """The test split of the aligned base, as column `before`."""
    rows = bench.rows
    items = measure(bench.bench, rows.items_harmful, rows.items_benign, refusals=rows.refusals, losses=False)
    wordings = measure(bench.bench, rows.wordings_harmful, rows.wordings_benign, refusals=rows.refusals, losses=False)
    return HeldOut(items={"before": items}, wordings={"before": wordings})


def _step(bench: Workbench) -> GradientStep:
    recipe, v = bench.recipe, bench.recipe.vaccine
    vaccine = Vaccine(bench.base, bench.cache, rho=v.rho, norm=v.norm, every=v.every)
    match recipe.alignment_step:
        case "plain":
            return Plain(bench.base, bench.cache)
        case "vaccine":
            return vaccine
        case "booster":
            return Booster(
                bench.base, bench.cache, recipe.antibody_align,
                parameters=lora.parameters(bench.base, bench.trained),
                harmful=bench.encode(bench.rows.calibration_harmful), seed=recipe.seed,
            )  # fmt: skip
        case "antibody_align":
            return _antibody(bench, None)
        case "vaccine_antibody":
            return _antibody(bench, vaccine)


def _antibody(bench: Workbench, vaccine: Vaccine | None) -> AntibodyAlign:
    """Antibody's alignment on the calibration hazards; with `vaccine`, g_A is taken under its perturbation."""
    harmful = bench.rows.calibration_harmful
    return AntibodyAlign(
        bench.base, bench.cache, bench.recipe.antibody_align,
        parameters=lora.parameters(bench.base, bench.trained), harmful=bench.encode(harmful),
        refused=bench.encode(refusals_for(harmful, "antibody", bench.rows.refusals)), seed=bench.recipe.seed,
        vaccine=vaccine,
    )  # fmt: skip


def calibrate(bench: Workbench) -> Calibration:
    """The screen's threshold and the nll below which a whole target counts as a refusal, under the active model."""
    rows = bench.rows
    refused = refusals_for(rows.calibration_harmful, "calibration", rows.refusals)
    harmful = read_rows(bench.base, bench.cache, bench.encode(refused), bench.refusal_ids)
    benign = read_rows(bench.base, bench.cache, bench.encode(_answered(rows.calibration_benign)), bench.refusal_ids)
    return Calibration(screen_threshold(harmful.mass, benign.mass), whole_refusal_limit(harmful.worst))


def _answered(pairs: Sequence[Pair]) -> list[Pair]:
    """The mass is read before the answer; pairs without one get a word to stand there."""
    return [Pair(pair.prompt, pair.answer or "Yes.") for pair in pairs]


def export(bench: Workbench, order: TrainOrder, scratch: Path, report: SafetyReport, found: Calibration) -> None:
    """Write result/alignment and result/reports/safety.json."""
    target = scratch / "result" / "alignment"
    factors = lora.read(bench.base, bench.trained)
    digest = lora.save(factors, target, base_id=order.recipe.base)
    about = {
        "base": order.recipe.base, "adapter_sha256": digest, "factors": lora.digest(factors),
        "calibration": asdict(found), "torch": torch.__version__,
    }  # fmt: skip
    (target / ABOUT_FILE).write_text(json.dumps(about, indent=2), encoding="utf-8")
    (target / "safety.json").write_text(report.model_dump_json(indent=2), encoding="utf-8")
    (scratch / "result" / "reports" / "safety.json").write_text(report.model_dump_json(indent=2), encoding="utf-8")


def read_alignment(folder: Path) -> tuple[Calibration, SafetyReport]:
    """What the align job left beside its adapter."""
    about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
    report = SafetyReport.model_validate_json((folder / "safety.json").read_text(encoding="utf-8"))
    return Calibration(**about["calibration"]), report

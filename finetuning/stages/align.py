"""Align a public base once: train its adapter on refusals and benign rows, measure it, calibrate the screen."""

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

import torch

from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import Finished, Note, Progress, StageProgress, StageStarted
from finetuning.contract.recipe import Recipe
from finetuning.contract.report import Metrics, SafetyReport
from finetuning.contract.shelf import FIRST_VERSION, from_shelf, part_from_shelf
from finetuning.defences.antibody_align import AntibodyAlign
from finetuning.defences.booster import Booster
from finetuning.defences.held_to_public import HeldToPublic
from finetuning.defences.plain import Even, Plain
from finetuning.defences.vaccine import Vaccine
from finetuning.job.context import JobContext
from finetuning.job.preflight import check
from finetuning.model import lora
from finetuning.model.digest import ABOUT_FILE, BaseFiles, base_files
from finetuning.model.losses import RowLosses
from finetuning.rows.chat_format import EncodedRow, opening
from finetuning.safety_rows.roles import refusals_for, rows_digest
from finetuning.screening.calibration import Calibration, calibrate
from finetuning.screening.declining import DecliningModel
from finetuning.screening.harm import HarmModel
from finetuning.stages import held_out
from finetuning.stages.base_answers import ask_base, with_answers, write_answers
from finetuning.stages.gate import decide
from finetuning.stages.own_answers import likely, own_answers, told
from finetuning.training import checkpoint
from finetuning.training.batches import Stream
from finetuning.training.loop import train
from finetuning.training.stage_clock import StageClock
from finetuning.training.state import LoopState
from finetuning.training.strategies import GradientStep


def run(job: JobContext, order: TrainOrder, scratch: Path, digest: str) -> Iterator[Progress]:
    """The align job. The aligned base must pass the gate itself, or no customer job may start from it."""
    clock = StageClock()
    check(job.recipe, job.model.base, (), job.operator_rows)
    yield StageStarted(stage="align", detail=f"Aligning {order.recipe.base} on refusals and benign rows")
    clock.start("answers")
    answers = yield from ask_base(job)
    job.operator_rows = with_answers(job.operator_rows, answers)
    rows = training_rows(job)
    clock.start("states")
    yield from _prepare(job, rows)
    clock.start("measure")
    with job.model.public():
        public = _measure(job, part=3)  # the public base complies with everything: fewer rows tell as much
        own = own_answers(job)
        public = likely(job, public, own)
    clock.start("align")
    state = yield from _train(job, order, scratch, digest=digest, rows=rows)
    clock.start("measure")
    yield StageStarted(stage="gate", detail="Measuring the aligned base")
    before = likely(job, _measure(job), own)
    yield from told(public.own_answers_nll, before.own_answers_nll)
    decision = decide(job.recipe.gate.limits, before, before)
    on_test = held_out.of_aligned_base(job.measuring, job.operator_rows) if order.recipe.evaluation.held_out else None
    calibration = calibrate(job.reader, job.operator_rows, rows)
    report = SafetyReport(
        recipe=order.recipe.name, judge=job.measuring.judge.name, safety_rows_sha256=rows_digest(job.operator_rows),
        metrics={"public": public, "before": before}, held_out=on_test, gate=decision, seconds=clock.seconds(),
    )  # fmt: skip
    yield StageStarted(stage="export", detail="Writing the alignment adapter")
    export(job, scratch, report, calibration, base=base_files(order.base, order.base_sha256))
    write_answers(answers, scratch / "result" / "alignment")
    yield Finished(
        released=decision.decision != "fail", reasons=decision.reasons, trained_tokens=state.tokens,
        seconds=clock.seconds(),
    )  # fmt: skip


def steps_of(recipe: Recipe, rows: int) -> int:
    """The recipe's steps, or as many as `min_passes` over the rows take."""
    return max(recipe.steps, ceil((recipe.min_passes or 0.0) * rows / recipe.batch_size))


def resumed(state: LoopState, same: bool) -> Note:
    """The note that goes out when a checkpoint was loaded."""
    if same:
        return Note(code="resumed", message=f"Resumed after step {state.next_step}; the result is bitwise the same")
    message = f"Resumed after step {state.next_step} on another machine or version; the result may differ in bits"
    return Note(level="warn", code="resumed_inexactly", message=message)


def _train(
    job: JobContext, order: TrainOrder, scratch: Path, *, digest: str, rows: Sequence[EncodedRow]
) -> Generator[Progress, None, LoopState]:
    """All steps, from the order's checkpoint on where there is one; checkpoints go to scratch/checkpoints."""
    batches = Stream(len(rows), job.recipe.batch_size, job.recipe.seed)
    # An operator's benign rows have answers of the base itself, and none that is invented: KL mends nothing there.
    losses = None if order.operator_rows else _losses(job, rows)
    setup = job.training(rows, _step(job, losses), Even(), batches=batches, steps=steps_of(job.recipe, len(rows)))
    setup.saves_to(scratch / "checkpoints", fingerprint=digest, every=job.recipe.save_every)
    state = LoopState()
    if order.checkpoint:
        state, same = checkpoint.restore(setup, scratch / order.checkpoint)
        yield resumed(state, same)
    yield from train(setup, state)
    return state


def training_rows(job: JobContext) -> list[EncodedRow]:
    """Refusals and benign rows; a share of them is cut after the opening, spread evenly."""
    rows = job.model.encode_operator([*job.operator_rows.aligned, *job.operator_rows.benign])
    cut = job.recipe.openings
    return [
        opening(row, cut.tokens) if int((i + 1) * cut.share + 1e-9) > int(i * cut.share + 1e-9) else row
        for i, row in enumerate(rows)
    ]


def _prepare(job: JobContext, rows: Sequence[EncodedRow]) -> Iterator[Progress]:
    size = 64
    for start in range(0, len(rows), size):
        job.model.cache.prepare([row.ids for row in rows[start : start + size]])
        yield StageProgress(stage="align", done=min(start + size, len(rows)), total=len(rows))


def _measure(job: JobContext, *, part: int = 1) -> Metrics:
    recipe, rows = job.recipe.evaluation, job.operator_rows
    harmful, benign = rows.gate_harmful[: recipe.harmful_rows // part], rows.gate_benign[: recipe.benign_rows // part]
    return job.measuring.metrics(harmful, benign, refusals=rows.refusals)


def _losses(job: JobContext, rows: Sequence[EncodedRow]) -> RowLosses | None:
    """Benign rows, which stand after the refusals, held to the public base; None for the rows' own nll."""
    if not job.recipe.benign_kl:
        return None
    benign = rows[len(job.operator_rows.aligned) :]
    with job.model.public():
        return HeldToPublic(job.model.base, job.model.cache, benign, weight=job.recipe.benign_kl)


def _step(job: JobContext, losses: RowLosses | None) -> GradientStep:
    recipe, v = job.recipe, job.recipe.vaccine
    vaccine = Vaccine(job.model.base, job.model.cache, rho=v.rho, norm=v.norm, every=v.every, losses=losses)
    match recipe.alignment_step:
        case "plain":
            return Plain(job.model.base, job.model.cache, losses)
        case "vaccine":
            return vaccine
        case "booster":
            return Booster(
                job.model.base, job.model.cache, recipe.antibody_align,
                parameters=job.model.parameters,
                harmful=job.model.encode_operator(job.operator_rows.calibration_harmful), seed=recipe.seed,
                losses=losses,
            )  # fmt: skip
        case "antibody_align":
            # a radius of 0 moves nothing: the rows' plain loss
            return _antibody(job, Vaccine(job.model.base, job.model.cache, rho=0.0, norm=v.norm, losses=losses))
        case "vaccine_antibody":
            return _antibody(job, vaccine)


def _antibody(job: JobContext, vaccine: Vaccine) -> AntibodyAlign:
    """Antibody's alignment on the calibration hazards; g_A is taken under the perturbation of `vaccine`."""
    model, harmful = job.model, job.operator_rows.calibration_harmful
    refused = refusals_for(harmful, "antibody", job.operator_rows.refusals)
    return AntibodyAlign(
        model.base, model.cache, job.recipe.antibody_align, parameters=model.parameters,
        harmful=model.encode_operator(harmful), refused=model.encode_operator(refused), seed=job.recipe.seed,
        vaccine=vaccine,
    )  # fmt: skip


def export(job: JobContext, scratch: Path, report: SafetyReport, found: Calibration, *, base: BaseFiles) -> None:
    """Write result/alignment, which says over which base's files it was made, and result/reports/safety.json."""
    target = scratch / "result" / "alignment"
    factors = job.model.read()
    digest = lora.save(factors, target, base_id=job.recipe.base)
    about = {
        "base": job.recipe.base, "adapter_sha256": digest, "factors": lora.digest(factors),
        "schema_version": FIRST_VERSION, "calibration": asdict(found), "torch": torch.__version__, **base.told(),
    }  # fmt: skip
    (target / ABOUT_FILE).write_text(json.dumps(about, indent=2), encoding="utf-8")
    (target / "safety.json").write_text(report.model_dump_json(indent=2), encoding="utf-8")
    (scratch / "result" / "reports" / "safety.json").write_text(report.model_dump_json(indent=2), encoding="utf-8")


def read_alignment(folder: Path) -> tuple[Calibration | None, SafetyReport]:
    """What the align job left beside its adapter; earlier releases' did not leave all of the calibration."""
    about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
    report = from_shelf(SafetyReport, (folder / "safety.json").read_text(encoding="utf-8"))
    return _calibration(about["calibration"]), report


def _calibration(found: dict[str, Any]) -> Calibration | None:
    """None where a part of it is missing: the job then calibrates its base itself."""
    if "harm" not in found or "declining" not in found:
        return None
    declining = part_from_shelf(DecliningModel, found["declining"]) if found["declining"] else None
    return part_from_shelf(
        Calibration, {**found, "harm": part_from_shelf(HarmModel, found["harm"]), "declining": declining}
    )

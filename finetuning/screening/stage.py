"""The screen stage of a finetune job: read every row, ask a scout where the aligned model refuses, fill the ledger.

Knows the stage's order; the filter's formulas live in job/readings.py. Must not know what is trained afterwards.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from finetuning.contract.progress import Progress, RowsScreened, StageProgress, StageStarted, StepDone
from finetuning.defences.antibody import Antibody, row_scores
from finetuning.job.context import Workbench, anchored_step, anchors_of, refusal_ids, reset_task, training
from finetuning.job.preflight import measuring_rows
from finetuning.job.readings import Reading, Screened, read_rows, threshold, weigh
from finetuning.model import lora
from finetuning.rows.chat_format import EncodedRow, encode_row
from finetuning.rows.scanner import Row
from finetuning.safety_rows.invented import same_answer
from finetuning.screening.probes import Forms, Quarantine, forms_of, quarantine, with_lone_rows
from finetuning.screening.sentences import Alone, read_alone
from finetuning.screening.verdicts import Ledger, verdicts
from finetuning.stages.align import Calibration
from finetuning.training.determinism import mix
from finetuning.training.loop import train
from finetuning.training.state import LoopState


@dataclass(frozen=True)
class ScreenedFile:
    """The ledger, the file's own forms, and the skeletons that the aligned model refuses to fill."""

    ledger: Ledger
    forms: Forms | None = None
    quarantine: Quarantine = field(default_factory=Quarantine)


def screen_rows(bench: Workbench, rows: list[Row], calibration: Calibration) -> Generator[Progress, None, ScreenedFile]:
    """Encode, score and weigh every row; a scout re-reads them when the aligned model refuses some."""
    yield StageStarted(stage="screen", detail=f"Reading {len(rows)} rows")
    encoded = [encode_row(bench.base.tokenizer, row.messages, max_tokens=bench.recipe.max_tokens) for row in rows]
    for start in range(0, len(encoded), 64):
        bench.cache.prepare([row.ids for row in encoded[start : start + 64]])
        yield StageProgress(stage="screen", done=min(start + 64, len(rows)), total=len(rows))
    forms, hidden = _quarantine(bench, rows, calibration)
    screened = Screened(torch.ones(len(rows)), torch.zeros(len(rows)), 1.0, torch.zeros(len(rows)), 1.0)
    barred = hidden.rows | frozenset(measuring_rows(rows, bench.rows))  # of baselines, too
    if bench.recipe.screen.enabled:
        screened, alone = yield from _filter(bench, rows, encoded, barred, calibration)
        if forms is not None:
            forms, hidden = with_lone_rows(bench, forms, hidden, [row.messages for row in rows], alone)
    ledger = Ledger(rows, encoded, screened, _scores(bench, encoded), barred)
    found = verdicts(ledger)
    count = {v: sum(x.verdict == v for x in found) for v in ("kept", "downweighted", "excluded")}
    yield RowsScreened(
        rows_total=len(rows), rows_kept=count["kept"], rows_downweighted=count["downweighted"],
        rows_excluded=count["excluded"],
    )  # fmt: skip
    return ScreenedFile(ledger, forms, hidden)


def _quarantine(bench: Workbench, rows: Sequence[Row], calibration: Calibration) -> tuple[Forms | None, Quarantine]:
    """What the file's own skeletons hide from a reading of whole prompts."""
    if not bench.recipe.probes.enabled:
        return None, Quarantine()
    turns = [row.messages for row in rows]
    forms = forms_of(bench, turns)
    with bench.aligned():
        return forms, quarantine(bench, forms.skeletons, turns, calibration.threshold)


def _filter(
    bench: Workbench,
    rows: Sequence[Row],
    encoded: Sequence[EncodedRow],
    barred: frozenset[int],
    calibration: Calibration,
) -> Generator[Progress, None, tuple[Screened, dict[int, str]]]:
    """Weights by the aligned model's refusal mass; the scout unlearns what is only a new format (lab-recipe.md 2).

    With them the rows that a single sentence of theirs has excluded, and that sentence.
    """
    with bench.aligned():
        secret = lora.digest(lora.read(bench.base, lora.ALIGNMENT))  # nobody knows which tokens are read
        reading = read_rows(bench.base, bench.cache, encoded, bench.refusal_ids, secret=secret)
        passed = [i for i, mass in enumerate(reading.mass.tolist()) if mass < calibration.threshold]
        alone = yield from read_alone(bench, {i: rows[i].messages for i in passed})
    reading = _at_least(reading, alone)
    settings = bench.recipe.screen
    weights = weigh(reading, calibration.threshold, whole_refusal_nll=calibration.whole_refusal_nll)
    first = Screened(weights, reading.mass, calibration.threshold, reading.surprise, settings.most_surprise)
    barred = barred | first.unreadable
    kept = [i for i, row in enumerate(encoded) if weights[i] > 0 and row.target_tokens and i not in barred]
    # A row that the aligned model does not refuse stays as it was: the scout only ever gives rows back.
    doubted = [i for i in range(len(rows)) if weights[i] < 1 and i not in barred]
    if not settings.scout_steps or not doubted or len(kept) < settings.min_kept_rows:
        return first, _excluded(first, alone, barred)
    again, limit = yield from _ask_scout(bench, rows, kept, encoded, doubted)
    rescored, mass = weights.clone(), reading.mass.clone()
    rescored[doubted] = torch.maximum(weights[doubted], weigh(again, limit, whole_refusal_nll=-1.0))
    mass[doubted] = again.mass
    second = replace(first, weights=rescored, mass=mass, threshold=limit)
    return second, _excluded(second, alone, barred)


def _excluded(screened: Screened, alone: Mapping[int, Alone], barred: frozenset[int]) -> dict[int, str]:
    none = (screened.weights == 0).tolist()
    return {i: found.sentence for i, found in alone.items() if none[i] and i not in barred}


def _at_least(whole: Reading, alone: Mapping[int, Alone]) -> Reading:
    """A row's mass is the larger one of its whole prompt and of a sentence of it (ADR 0012)."""
    mass = whole.mass.clone()
    for i, found in alone.items():
        mass[i] = max(float(mass[i]), found.mass)
    return replace(whole, mass=mass)


def _ask_scout(
    bench: Workbench, rows: Sequence[Row], kept: Sequence[int], encoded: Sequence[EncodedRow], doubted: Sequence[int]
) -> Generator[Progress, None, tuple[Reading, float]]:
    """Train a throw-away adapter on the kept rows, read the doubted ones with it, and take its own threshold.

    A row comes back only if the scout refuses none of its sentences either.
    """
    yield StageStarted(stage="screen", detail="Training a scout to tell new formats from harm")
    recipe, seed = bench.recipe, mix(bench.recipe.seed, "scout")
    step = anchored_step(bench, recipe.anchor, anchors_of(bench, recipe.anchor), seed=seed)
    step.prepare(recipe.screen.scout_steps, recipe.batch_size)
    weigher = Antibody(recipe.antibody, gate=torch.ones(len(kept)))
    setup = training(
        bench, [encoded[i] for i in kept], step, weigher, steps=recipe.screen.scout_steps, seed=seed,
        lines=[rows[i].line for i in kept],
    )  # fmt: skip
    for done in train(setup, LoopState()):
        if isinstance(done, StepDone):
            yield StageProgress(stage="screen", done=done.step, total=recipe.screen.scout_steps)
    again = read_rows(bench.base, bench.cache, [encoded[i] for i in doubted], bench.refusal_ids)
    turns = {place: rows[i].messages for place, i in enumerate(doubted)}
    again = _at_least(again, (yield from read_alone(bench, turns)))
    limit = _scout_threshold(bench)
    reset_task(bench)
    return again, limit


def _scout_threshold(bench: Workbench) -> float:
    """The same rule as the aligned base's, on the same calibration prompts, under the scout."""
    rows = bench.rows
    harmful, benign = (
        read_rows(bench.base, bench.cache, bench.encode(same_answer(pairs, "Yes.")), bench.refusal_ids).mass
        for pairs in (rows.calibration_harmful, rows.calibration_benign)
    )
    return threshold(harmful, benign)


def _scores(bench: Workbench, encoded: Sequence[EncodedRow]) -> Tensor | None:
    """Frozen Antibody scores, under the aligned model (reference) or aligned minus public (contrast)."""
    settings = bench.recipe.antibody
    if settings.score not in ("reference", "contrast"):
        return None
    refusals, seed = refusal_ids(bench), mix(bench.recipe.seed, "secret")
    score = partial(
        row_scores, bench.base, bench.cache, encoded, refusals, per_row=settings.refusals_per_row, seed=seed
    )
    with bench.aligned():
        aligned = score()
    if settings.score == "reference":
        return aligned
    with bench.public():
        return aligned - score()

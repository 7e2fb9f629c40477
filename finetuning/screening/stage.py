"""The screen stage of a finetune job: read every row, ask a scout where the aligned model refuses, fill the ledger.

The screen is ours, no paper's; Antibody's row scores are computed beside it only where a recipe asks for them.

The filter's formulas live in job/readings.py.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from finetuning.contract.progress import Progress, RowsScreened, StageProgress, StageStarted, StepDone
from finetuning.defences.antibody import row_scores
from finetuning.defences.screen_weights import ScreenWeights
from finetuning.job.context import JobContext
from finetuning.job.preflight import measuring_rows
from finetuning.job.readings import Reading, Screened, weigh
from finetuning.rows.chat_format import EncodedRow
from finetuning.rows.scanner import Row
from finetuning.screening.calibration import Calibration, mass_threshold
from finetuning.screening.probes import FileForms, forms_of, with_lone_rows
from finetuning.screening.quarantine import GapReader, Quarantine, quarantine
from finetuning.screening.sentences import Alone, read_alone
from finetuning.screening.verdicts import Ledger, verdicts
from finetuning.training.batches import Stream
from finetuning.training.determinism import mix, seed_of
from finetuning.training.loop import train
from finetuning.training.state import LoopState


@dataclass(frozen=True)
class ScreenedFile:
    """The ledger, the file's own forms, and those that the aligned model refuses to fill."""

    ledger: Ledger
    forms: FileForms | None = None
    quarantine: Quarantine = field(default_factory=Quarantine)


@dataclass(frozen=True)
class _File:
    """The customer's rows, and the same encoded."""

    rows: list[Row]
    encoded: list[EncodedRow]


def screen_rows(job: JobContext, rows: list[Row], calibration: Calibration) -> Generator[Progress, None, ScreenedFile]:
    """Encode, score and weigh every row; a scout re-reads them when the aligned model refuses some."""
    yield StageStarted(stage="screen", detail=f"Reading {len(rows)} rows")
    file = _File(rows, [job.model.encode(row.messages) for row in rows])
    for start in range(0, len(rows), 64):
        job.model.cache.prepare([row.ids for row in file.encoded[start : start + 64]])
        yield StageProgress(stage="screen", done=min(start + 64, len(rows)), total=len(rows))
    forms, hidden = _quarantine(job, rows, calibration)
    screened = _unread(len(rows))
    barred = hidden.rows | frozenset(measuring_rows(rows, job.operator_rows))  # of baselines, too
    if job.recipe.screen.enabled:
        screened, alone = yield from _filter(job, file, barred, calibration)
        if forms is not None:
            turns = [row.messages for row in rows]
            forms, hidden = with_lone_rows(job.measuring, job.operator_rows, (forms, hidden), rows=turns, alone=alone)
    ledger = Ledger(rows, file.encoded, screened, _scores(job, file.encoded), barred)
    found = verdicts(ledger)
    count = {v: sum(x.verdict == v for x in found) for v in ("kept", "downweighted", "excluded")}
    yield RowsScreened(
        rows_total=len(rows), rows_kept=count["kept"], rows_downweighted=count["downweighted"],
        rows_excluded=count["excluded"],
    )  # fmt: skip
    return ScreenedFile(ledger, forms, hidden)


def _unread(rows: int) -> Screened:
    """Every row as it is, where the screen is off."""
    nothing = torch.zeros(rows)
    return Screened(torch.ones(rows), nothing, 1.0, nothing, 1.0, was_read=False)


def _quarantine(job: JobContext, rows: Sequence[Row], calibration: Calibration) -> tuple[FileForms | None, Quarantine]:
    """What the file's own forms hide from a reading of whole prompts."""
    if not job.recipe.probes.enabled:
        return None, Quarantine()
    turns = [row.messages for row in rows]
    forms = forms_of(job.measuring, job.operator_rows, turns)
    gaps = GapReader(job.reader, calibration.threshold, job.operator_rows.refusals[0])
    with job.model.aligned():
        return forms, quarantine(gaps, forms.forms, turns, secret=job.secret)


def _filter(
    job: JobContext, file: _File, barred: frozenset[int], calibration: Calibration
) -> Generator[Progress, None, tuple[Screened, dict[int, str]]]:
    """Weights by the aligned model's refusal mass; the scout unlearns what is only a new format (methods.md 8.2).

    With them the rows that a single sentence of theirs has excluded, and that sentence.
    """
    rows, settings = file.rows, job.recipe.screen
    with job.model.aligned():
        reading = job.reader.read(file.encoded, secret=job.secret)
        passed = [i for i, mass in enumerate(reading.mass.tolist()) if mass < calibration.threshold]
        refusal = job.operator_rows.refusals[0]
        alone = yield from read_alone(job.reader, {i: rows[i].messages for i in passed}, refusal)
    reading = _at_least(reading, alone)
    weights = weigh(reading, calibration.threshold, whole_refusal_nll=calibration.whole_refusal_nll)
    first = Screened(weights, reading.mass, calibration.threshold, reading.surprise, settings.most_surprise)
    never = barred | first.unreadable
    kept = [i for i, row in enumerate(file.encoded) if weights[i] > 0 and row.target_tokens and i not in never]
    # A row that the aligned model does not refuse stays as it was: the scout only ever gives rows back.
    doubted = [i for i in range(len(rows)) if weights[i] < 1 and i not in never]
    if not settings.scout_steps or not doubted or len(kept) < settings.min_kept_rows:
        return first, _excluded(first, alone, never)
    again, limit = yield from _ask_scout(job, file, kept, doubted)
    rescored, mass = weights.clone(), reading.mass.clone()
    rescored[doubted] = torch.maximum(weights[doubted], weigh(again, limit, whole_refusal_nll=-1.0))
    mass[doubted] = again.mass
    second = replace(first, weights=rescored, mass=mass, threshold=limit)
    return second, _excluded(second, alone, never)


def _excluded(screened: Screened, alone: Mapping[int, Alone], never: frozenset[int]) -> dict[int, str]:
    """Rows that their sentence alone has excluded, and that sentence."""
    none = (screened.weights == 0).tolist()
    return {i: found.sentence for i, found in alone.items() if none[i] and i not in never}


def _at_least(whole: Reading, alone: Mapping[int, Alone]) -> Reading:
    """A row's mass is the larger one of its whole prompt and of a sentence of it (ADR 0012)."""
    mass = whole.mass.clone()
    for i, found in alone.items():
        mass[i] = max(float(mass[i]), found.mass)
    return replace(whole, mass=mass)


def _ask_scout(
    job: JobContext, file: _File, kept: Sequence[int], doubted: Sequence[int]
) -> Generator[Progress, None, tuple[Reading, float]]:
    """Train a throw-away adapter on the kept rows, read the doubted ones with it, and take its own threshold.

    A row comes back only if the scout refuses none of its sentences either.
    """
    yield StageStarted(stage="screen", detail="Training a scout to tell new formats from harm")
    recipe, seed = job.recipe, mix(job.recipe.seed, "scout")
    batches, step = Stream(len(kept), recipe.batch_size, seed), job.anchored_step(recipe.anchor, seed=seed)
    step.prepare(batches, recipe.screen.scout_steps)
    weigher = ScreenWeights(torch.ones(len(kept)), min_share=recipe.antibody.min_weight_share)
    setup = job.training(
        [file.encoded[i] for i in kept], step, weigher,
        batches=batches, steps=recipe.screen.scout_steps, lines=[file.rows[i].line for i in kept],
    )  # fmt: skip
    for done in train(setup, LoopState()):
        if isinstance(done, StepDone):
            yield StageProgress(stage="screen", done=done.step, total=recipe.screen.scout_steps)
    again = job.reader.read([file.encoded[i] for i in doubted])
    turns = {place: file.rows[i].messages for place, i in enumerate(doubted)}
    again = _at_least(again, (yield from read_alone(job.reader, turns, job.operator_rows.refusals[0])))
    limit = mass_threshold(job.reader, job.operator_rows)
    job.model.reset()
    return again, limit


def _scores(job: JobContext, encoded: Sequence[EncodedRow]) -> Tensor | None:
    """Antibody's frozen scores, under the aligned model (reference) or aligned minus public (contrast); None for `none`
    and `current`."""
    settings = job.recipe.antibody
    if settings.score not in ("reference", "contrast"):
        return None
    refusals, seed = job.stock_refusals(), seed_of(job.hidden_draw("refusals"))

    def score() -> Tensor:
        base, cache = job.model.base, job.model.cache
        return row_scores(base, cache, encoded, refusals, per_row=settings.refusals_per_row, seed=seed)

    with job.model.aligned():
        aligned = score()
    if settings.score == "reference":
        return aligned
    with job.model.public():
        return aligned - score()

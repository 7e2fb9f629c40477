"""The screen stage of a finetune job: read every row, ask a scout where the aligned model refuses, fill the ledger.

The screen is ours, no paper's; Antibody's row scores are computed beside it where a recipe asks for them.

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
from finetuning.job.readings import Screened, weigh
from finetuning.judging.refusals import only_declines
from finetuning.rows.chat_format import EncodedRow
from finetuning.rows.scanner import Message, Row
from finetuning.screening.calibration import Calibration, mass_threshold
from finetuning.screening.declining import declining_rows
from finetuning.screening.harm_reader import HarmReader, HarmReading
from finetuning.screening.probes import FileForms, forms_of, with_lone_rows
from finetuning.screening.quarantine import Quarantine, quarantine
from finetuning.screening.verdicts import Ledger, verdicts
from finetuning.training.batches import Stream
from finetuning.training.determinism import mix, seed_of
from finetuning.training.loop import train
from finetuning.training.state import LoopState

# What is only a new format is no harm at all to a scout, whose refusals of real harm wear thin.
_CLEARED = 0.1


@dataclass(frozen=True)
class ScreenedFile:
    """The ledger, the file's own forms, and those that the aligned model refuses to fill."""

    ledger: Ledger
    forms: FileForms | None = None
    quarantine: Quarantine = field(default_factory=Quarantine)


@dataclass(frozen=True)
class _File:
    """The customer's rows, the same encoded, those that a form hides and those that measure (indices)."""

    rows: list[Row]
    encoded: list[EncodedRow]
    hidden: frozenset[int] = frozenset()
    measuring: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _Filtered:
    """What the filter found; the rows that a single sentence of theirs has excluded, with it; the rows that never
    train, whatever their weight."""

    screened: Screened
    alone: Mapping[int, str]
    barred: frozenset[int]


def screen_rows(job: JobContext, rows: list[Row], calibration: Calibration) -> Generator[Progress, None, ScreenedFile]:
    """Encode, score and weigh every row; a scout re-reads them when the aligned model refuses some."""
    yield StageStarted(stage="screen", detail=f"Reading {len(rows)} rows")
    file = _File(rows, [job.model.encode(row.messages) for row in rows])
    for start in range(0, len(rows), 64):
        job.model.cache.prepare([row.ids for row in file.encoded[start : start + 64]])
        yield StageProgress(stage="screen", done=min(start + 64, len(rows)), total=len(rows))
    harm = HarmReader(job.reader, calibration.harm, calibration.threshold, job.operator_rows.refusals[0])
    forms, hidden = _quarantine(job, rows, harm)
    file = replace(file, hidden=hidden.rows, measuring=frozenset(measuring_rows(rows, job.operator_rows)))
    found = _Filtered(_unread(len(rows)), {}, file.hidden | file.measuring)  # of baselines, too
    if job.recipe.screen.enabled:
        found = yield from _filter(job, file, harm=harm, calibration=calibration)
        if forms is not None:
            turns = [row.messages for row in rows]
            stopped = found.barred.union(torch.nonzero(found.screened.weights == 0)[:, 0].tolist()) - file.measuring
            forms, hidden = with_lone_rows(
                job.measuring, job.operator_rows, (forms, hidden), rows=turns, alone=found.alone, stopped=stopped
            )
    ledger = Ledger(rows, file.encoded, found.screened, _scores(job, file.encoded), found.barred)
    told = verdicts(ledger)
    count = {v: sum(x.verdict == v for x in told) for v in ("kept", "downweighted", "excluded")}
    yield RowsScreened(
        rows_total=len(rows), rows_kept=count["kept"], rows_downweighted=count["downweighted"],
        rows_excluded=count["excluded"],
    )  # fmt: skip
    return ScreenedFile(ledger, forms, hidden)


def _unread(rows: int) -> Screened:
    """Every row as it is, where the screen is off."""
    nothing = torch.zeros(rows)
    return Screened(torch.ones(rows), nothing, nothing, nothing, 1.0, was_read=False)


def _quarantine(job: JobContext, rows: Sequence[Row], harm: HarmReader) -> tuple[FileForms | None, Quarantine]:
    """What the file's own forms hide from a reading of whole prompts."""
    if not job.recipe.probes.enabled:
        return None, Quarantine()
    turns = [row.messages for row in rows]
    forms = forms_of(job.measuring, job.operator_rows, turns)
    with job.model.aligned():
        return forms, quarantine(harm, forms.forms, turns, secret=job.secret)


def _filter(
    job: JobContext, file: _File, *, harm: HarmReader, calibration: Calibration
) -> Generator[Progress, None, _Filtered]:
    """Weights by the probability of harm; the scout unlearns what is only a new format (methods.md 8.2)."""
    rows, settings = file.rows, job.recipe.screen
    turns = [row.messages for row in rows]
    with job.model.aligned():
        found = yield from harm.of_rows(turns, file.encoded, secret=job.secret)
        weights = weigh(found.harm, found.whole.worst, whole_refusal_nll=calibration.whole_refusal_nll)
        stopped = [i for i in range(len(rows)) if weights[i] < 1 or i in file.hidden]
        declining = _declining(job, turns, stopped, calibration=calibration)
    weights[list(declining)] = 1.0
    first = Screened(weights, found.whole.mass, found.harm, found.whole.surprise, settings.most_surprise)
    barred = file.measuring | (file.hidden - declining)
    never = barred | first.unreadable
    kept = [i for i, row in enumerate(file.encoded) if weights[i] > 0 and row.target_tokens and i not in never]
    # A row that the aligned model does not refuse stays as it was: the scout only ever gives rows back.
    doubted = [i for i in range(len(rows)) if weights[i] < 1 and i not in never]
    if not settings.scout_steps or not doubted or len(kept) < settings.min_kept_rows:
        return _Filtered(first, _excluded(first, found.worst, never), barred)
    again = yield from _ask_scout(job, file, kept, doubted, harm=harm)
    rescored, probability, mass = weights.clone(), found.harm.clone(), found.whole.mass.clone()
    cleared = again.harm <= _CLEARED
    rescored[doubted] = torch.where(cleared, torch.ones(len(doubted)), weights[doubted])
    probability[doubted] = torch.where(cleared, again.harm, found.harm[doubted])
    mass[doubted] = again.whole.mass
    second = replace(first, weights=rescored, mass=mass, harm=probability)
    return _Filtered(second, _excluded(second, found.worst, never), barred)


def _declining(
    job: JobContext, rows: Sequence[Sequence[Message]], stopped: Sequence[int], *, calibration: Calibration
) -> frozenset[int]:
    """Those of the stopped rows whose every answer that trains only declines, in whatever words: that is no harm."""
    plain = [i for i in stopped if _declines(job, rows[i])]
    if calibration.declining is None:
        return frozenset(plain)
    return frozenset([*plain, *declining_rows(job.reader, calibration.declining, rows, stopped)])


def _declines(job: JobContext, row: Sequence[Message]) -> bool:
    """Whether every answer that trains only declines by our patterns."""
    answers = [m.content for m in row if m.role == "assistant" and m.weight == 1]
    return bool(answers) and all(only_declines(text, job.measuring.rules.declines) for text in answers)


def _excluded(screened: Screened, alone: Mapping[int, str], never: frozenset[int]) -> dict[int, str]:
    """Rows that their sentence alone has excluded, and that sentence."""
    none = (screened.weights == 0).tolist()
    return {i: sentence for i, sentence in alone.items() if none[i] and i not in never}


def _ask_scout(
    job: JobContext, file: _File, kept: Sequence[int], doubted: Sequence[int], *, harm: HarmReader
) -> Generator[Progress, None, HarmReading]:
    """Train a throw-away adapter on the kept rows, and read the doubted ones with it, by its own threshold.

    A row comes back only if the scout refuses none of its suspicious sentences either.
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
    scout = replace(harm, threshold=mass_threshold(job.reader, job.operator_rows))
    again = yield from scout.of_rows([file.rows[i].messages for i in doubted], [file.encoded[i] for i in doubted])
    job.model.reset()
    return again


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

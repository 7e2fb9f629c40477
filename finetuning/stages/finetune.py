"""Fine-tune a customer's adapter over an aligned base: screen, train, prune, gate, export, with the retry ladder.

The formulas stand in screening/, defences/ and the modules beside this one.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import CheckpointSaved, Finished, Note, Progress, StageStarted, StepDone
from finetuning.contract.recipe import AnchorSettings, AntidoteSettings, Recipe
from finetuning.contract.report import GateDecision, HeldOut, Measure, Metrics, SafetyReport
from finetuning.defences.antibody import Antibody, LiveScores
from finetuning.defences.constrained import Constrained
from finetuning.defences.lisa import Lisa
from finetuning.defences.safe_lora import projected
from finetuning.defences.screen_weights import ScreenWeights
from finetuning.job.context import JobContext
from finetuning.job.measure import attention_outputs, drift
from finetuning.job.preflight import check
from finetuning.model import lora
from finetuning.model.digest import UNBOUND, base_files, require_same_base
from finetuning.rows.chat_format import EncodedRow
from finetuning.rows.scanner import iter_rows
from finetuning.safety_rows.roles import rows_digest
from finetuning.screening.calibration import Calibration, calibrate
from finetuning.screening.probes import ProbeResult, probe
from finetuning.screening.quarantine import Quarantine, repair
from finetuning.screening.stage import ScreenedFile, screen_rows
from finetuning.screening.verdicts import Ledger, verdicts
from finetuning.stages import export, held_out
from finetuning.stages.align import read_alignment, resumed, training_rows
from finetuning.stages.base_answers import read_answers, unanswered, with_answers
from finetuning.stages.customer_prompts import CustomerPrompts, from_kept_rows, from_validation
from finetuning.stages.gate import TaskFloor, decide, is_unsafe, with_probes
from finetuning.stages.pruning import PruneChoice, choose_pruning, stronger
from finetuning.stages.task_floor import kept_loss, plain_loss
from finetuning.training import checkpoint
from finetuning.training.batches import Epochs, StepRows, Stream
from finetuning.training.determinism import mix, seed_of
from finetuning.training.loop import train
from finetuning.training.stage_clock import StageClock
from finetuning.training.state import LoopState
from finetuning.training.strategies import GradientStep, RowWeigher

_DRIFT_ROWS = 16
# A short fine-tune saves at least so often, less one: the last step is exported instead.
_FEWEST_SAVES = 4
_NO_ANCHORS = "The aligned base begins no refusal where the KL term would hold it, so that term is left out"


class DataRejected(ValueError):
    """Too little of the file may be learned; nothing was trained."""


@dataclass(frozen=True)
class _Run:
    """What the attempts of one job share: where it runs, and what it knows of its customer and of the aligned base."""

    order: TrainOrder
    scratch: Path
    fingerprint: str
    clock: StageClock
    screened: ScreenedFile
    prompts: CustomerPrompts
    before: Metrics
    plain_loss: Measure | None

    @property
    def ledger(self) -> Ledger:
        """Every row with its verdict."""
        return self.screened.ledger

    @property
    def kept(self) -> list[EncodedRow]:
        """The rows that train."""
        return [self.ledger.encoded[i] for i in self.ledger.kept]


@dataclass(frozen=True)
class Outcome:
    """The last attempt's end: chosen pruning, measures before and after it, the decision, trained tokens."""

    choice: PruneChoice
    tuned: Metrics
    after: Metrics
    answers: list[str]
    decision: GateDecision
    tokens: int


def run(job: JobContext, order: TrainOrder, scratch: Path, digest: str) -> Iterator[Progress]:
    """The finetune job. Raises DataRejected, NonFiniteLoss, NonFiniteScore."""
    assert order.alignment is not None
    assert order.rows is not None
    clock = StageClock()
    known, base_report = read_alignment(scratch / order.alignment)
    yield from _answer_benign_rows(job, scratch / order.alignment)
    yield from _unbound(order, scratch / order.alignment)
    alignment = job.model.alignment_digest()
    most = job.recipe.evaluation.task_rows
    task = from_validation(job.model, scratch / order.validation, most=most) if order.validation else None
    clock.start("screen")
    rows = list(iter_rows(scratch / order.rows))
    check(job.recipe, job.model.base, rows, job.operator_rows)
    screened = yield from screen_rows(job, rows, known or _calibrated(job))
    export.write_ledger(scratch, verdicts(screened.ledger))
    _require_enough(job.recipe, screened.ledger)
    prompts = task or from_kept_rows(job.model, screened.ledger)
    clock.start("reference")
    plain = yield from _plain_loss(job, screened.ledger)
    shared = _Run(order, scratch, digest, clock, screened, prompts, base_report.metrics["before"], plain)
    outcome = yield from _attempts(job, shared)
    found = yield from _held_out(job, shared, base_report.held_out or HeldOut(), outcome)
    if job.model.alignment_digest() != alignment:
        raise RuntimeError("the alignment adapter changed during the job")
    clock.start("export")
    yield StageStarted(stage="export", detail="Writing adapters and reports")
    report = SafetyReport(
        recipe=job.recipe.name, judge=job.measuring.judge.name, safety_rows_sha256=rows_digest(job.operator_rows),
        metrics={**base_report.metrics, "tuned": outcome.tuned, "after": outcome.after}, held_out=found,
        prune=outcome.choice.trials, alpha=outcome.choice.alpha, mu=outcome.choice.mu,
        pruned_layers=outcome.choice.layers, pruning=outcome.choice.outcome, plain_kept_loss=plain,
        gate=outcome.decision, seconds=clock.seconds(),
    )  # fmt: skip
    export.write_results(job, scratch, report, outcome.choice)
    yield Finished(
        released=outcome.decision.decision != "fail", reasons=outcome.decision.reasons, trained_tokens=outcome.tokens,
        seconds=clock.seconds(),
    )  # fmt: skip


def _answer_benign_rows(job: JobContext, alignment: Path) -> Iterator[Note]:
    """Give the operator's benign rows the answers that the base gave when it was aligned. Raises BadOperatorRows."""
    answers = read_answers(alignment)
    lost = unanswered(job.operator_rows, answers)
    if lost:
        why = "they came after the base was aligned, or it declined them"
        yield Note(code="benign_rows_left_out", message=f"{lost} benign safety rows have no answer: {why}")
    job.operator_rows = with_answers(job.operator_rows, answers)


def _calibrated(job: JobContext) -> Calibration:
    """The calibration of a base that an earlier release aligned."""
    with job.model.aligned():
        return calibrate(job.reader, job.operator_rows, training_rows(job))


def _unbound(order: TrainOrder, alignment: Path) -> Iterator[Note]:
    """A note where the alignment does not say over which files of its base it was made. Raises OtherBase."""
    if not require_same_base(alignment, base_files(order.base, order.base_sha256)):
        yield Note(level="warn", code="alignment_unbound", message=UNBOUND)


def _held_out(
    job: JobContext, run: _Run, known: HeldOut, outcome: Outcome
) -> Generator[Progress, None, HeldOut | None]:
    """The test split, opened after the decision, where the recipe asks for it; `known` is the aligned base's."""
    if not job.recipe.evaluation.held_out:
        return None
    run.clock.start("held_out")
    yield StageStarted(stage="gate", detail="Opening the held-out split for the report")
    found = held_out.of_result(job.measuring, job.operator_rows, known, run.prompts, answers=outcome.answers)
    if outcome.choice.spectral is None or not outcome.choice.mu:
        return found
    job.model.write(outcome.choice.spectral.trained)
    found = held_out.with_unpruned(job.measuring, job.operator_rows, found)
    job.model.write(outcome.choice.pruned.adapter)
    return found


def _attempts(job: JobContext, run: _Run) -> Generator[Progress, None, Outcome]:
    """Train, prune and measure until the gate passes or the ladder ends."""
    gate, model = job.recipe.gate, job.model
    checkpointed = run.scratch / run.order.checkpoint if run.order.checkpoint else None
    attempt = first = checkpoint.attempt_of(checkpointed) if checkpointed else 1
    while True:
        run.clock.start("train")
        tokens = yield from _learned(job, run, attempt, checkpointed if attempt == first else None)
        run.clock.start("prune")
        trained = model.read()
        choice = yield from _pruned(job, trained, run.kept)
        run.clock.start("gate")
        yield StageStarted(stage="gate", detail="Measuring the result on rows that chose nothing")
        unpruned = None if choice.outcome == "not pruned" else _measure_unpruned(job, trained, choice, run)
        outcome = _outcome(job, run, choice, unpruned, tokens=tokens, attempt=attempt)
        for mu in choice.harder(job.recipe.antidote):
            if not is_unsafe(outcome.decision):
                break
            yield Note(level="warn", code="pruned_harder", message=_harder(attempt, outcome.decision, mu))
            more, unpruned = choice.at(mu), unpruned or outcome.after
            model.write(more.pruned.adapter)
            outcome = _outcome(job, run, more, unpruned, tokens=tokens, attempt=attempt)
        if outcome.decision.decision != "fail" or attempt == 1 + gate.retries or job.given is not None:
            return outcome
        yield Note(
            level="warn", code="gate_retry", message=f"Attempt {attempt} did not pass: {outcome.decision.reasons[0]}"
        )
        attempt += 1


def _harder(attempt: int, decision: GateDecision, mu: float) -> str:
    return f"Attempt {attempt} did not pass: {decision.reasons[0]}; pruning at mu {mu:g} before anything trains again"


def _outcome(
    job: JobContext, run: _Run, choice: PruneChoice, unpruned: Metrics | None, *, tokens: int, attempt: int
) -> Outcome:
    """The gate's decision on the model as it is; `unpruned` is what was measured before pruning, if that was done."""
    gate = job.recipe.gate
    after, answers = _measure(job, run)
    tuned = unpruned or after
    floor = TaskFloor(run.plain_loss, tuned)
    decision = decide(gate.limits, after, run.before, floor=floor, attempts=attempt)
    if run.screened.forms is not None:
        decision = with_probes(decision, _probe(job, run.screened))
    if not gate.enabled:
        decision = decision.model_copy(update={"decision": "disabled"})
    return Outcome(choice, tuned, after, answers, decision, tokens)


def _pruned(
    job: JobContext, trained: lora.Adapter, kept: Sequence[EncodedRow]
) -> Generator[Progress, None, PruneChoice]:
    """Choose how much of the trained adapter to prune, which may be nothing, and say what was done."""
    settings = job.recipe.antidote
    yield StageStarted(stage="prune", detail=_what_is_pruned(settings))
    if job.recipe.safe_lora.enabled:
        job.model.write(projected(trained, job.model.alignment(), job.recipe.safe_lora).adapter)
    anchored = job.given is None and job.recipe.anchor.mix_share > 0
    choice = choose_pruning(job.measuring, job.operator_rows, settings, kept, anchored=anchored)
    if settings.enabled:
        yield Note(code=choice.outcome.replace(" ", "_"), message=choice.sentence)
    return choice


def _what_is_pruned(settings: AntidoteSettings) -> str:
    """What a person reads before it; the published rule takes its alpha whatever it does."""
    if not settings.enabled:
        return "Pruning is not part of this job"
    if settings.rule == "last":
        last = f"mu {settings.mus[-1]:g}" if settings.score == "spectral" else f"alpha {settings.alphas[-1]:g}"
        return f"Pruning at {last}, whatever it does"
    if settings.score == "spectral":
        return "Choosing on the kept rows how much to prune: as much as they do not notice"
    return "Choosing on calibration rows how much to prune; nothing is one of the choices"


def _plain_loss(job: JobContext, ledger: Ledger) -> Generator[Progress, None, Measure | None]:
    """What a short plain fine-tune of the kept rows comes to; None where no limit of the gate asks."""
    if job.recipe.gate.limits.max_kept_loss_ratio is None:
        return None
    _, steps = _batches(job.recipe, len(ledger.kept))
    return (yield from plain_loss(job, [ledger.encoded[i] for i in ledger.kept], steps=steps))


def _learned(job: JobContext, run: _Run, attempt: int, resume: Path | None) -> Generator[Progress, None, int]:
    """Put the adapter in place: trained now, or the given one, which costs no tokens. Raises AdapterMismatch."""
    if job.given is None:
        return (yield from _train(job, run, attempt, resume))
    yield StageStarted(stage="train", detail="Taking the adapter that was trained elsewhere; nothing trains")
    job.model.write(job.given)
    return 0


def _train(job: JobContext, run: _Run, attempt: int, resume: Path | None) -> Generator[Progress, None, int]:
    """One rung of the ladder; returns the tokens trained. Resumes from a checkpoint of the same rung."""
    recipe, ledger, kept = job.recipe, run.ledger, run.ledger.kept
    anchor, optimiser = stronger(_repairing(recipe, run.screened.quarantine), recipe.optimiser, attempt)
    yield StageStarted(stage="train", detail=f"Training on {len(kept)} rows, attempt {attempt}")
    job.model.reset()
    if recipe.tuning_step == "anchored" and anchor.kl_weight and not job.anchors(anchor).ids:
        yield Note(level="warn", code="no_kl_anchors", message=_NO_ANCHORS)
    batches, steps = _batches(recipe, len(kept))
    step = _step(job, anchor, run.screened.quarantine, batches=batches, steps=steps)
    setup = job.training(
        run.kept, step, _weigher(job, ledger, kept), batches=batches, steps=steps,
        optimiser=optimiser, lines=[ledger.rows[i].line for i in kept],
    )  # fmt: skip
    every = recipe.save_every if recipe.steps else min(recipe.save_every, max(1, steps // _FEWEST_SAVES))
    setup.saves_to(run.scratch / "checkpoints", fingerprint=run.fingerprint, every=every, attempt=attempt)
    state = LoopState()
    if resume is not None:
        state, same = checkpoint.restore(setup, resume)
        yield resumed(state, same)
    for progress in train(setup, state):
        yield _in_ladder(progress, steps, attempt)
    return state.tokens


def _repairing(recipe: Recipe, found: Quarantine) -> AnchorSettings:
    """The anchor with room for the rows that repair quarantined forms; what a retry strengthens."""
    share = max(recipe.anchor.mix_share, recipe.probes.repair_share) if found.forms else recipe.anchor.mix_share
    return recipe.anchor.model_copy(update={"mix_share": share})


def _batches(recipe: Recipe, rows: int) -> tuple[StepRows, int]:
    """Which rows each step sees, and how many steps: whole epochs of the rows that train, unless steps are given.

    Lisa's turns on refusals come on top of the epochs.
    """
    size, seed, lisa = recipe.batch_size, mix(recipe.seed, "order"), recipe.lisa
    if recipe.steps:
        return Stream(rows, size, seed), recipe.steps
    epochs = Epochs(rows, size, seed)
    if recipe.tuning_step == "lisa":
        epochs = replace(epochs, own_steps=lisa.align_steps, user_steps=lisa.user_steps)
    return epochs, epochs.steps(recipe.epochs)


def _step(job: JobContext, anchor: AnchorSettings, found: Quarantine, *, batches: StepRows, steps: int) -> GradientStep:
    """The gradient step that the recipe names; quarantined forms are repaired by mixing rows in."""
    recipe, model = job.recipe, job.model
    match recipe.tuning_step:
        case "anchored":
            rows = repair(model, job.operator_rows, found)
            step = job.anchored_step(
                anchor, seed=mix(recipe.seed, "anchor"), refused=rows.refused, answered=rows.answered
            )
            step.prepare(batches, steps)
            return step
        case "lisa":
            return Lisa(
                model.base, model.cache, recipe.lisa, parameters=model.parameters,
                aligned=model.encode_operator(job.operator_rows.aligned), steps=steps,
                seed=mix(recipe.seed, "lisa"),
            )  # fmt: skip
        case "constrained":
            return Constrained(model.base, model.cache, recipe.constrained, reference=(lora.ALIGNMENT,))


def _in_ladder(progress: StepDone | CheckpointSaved, steps: int, attempt: int) -> StepDone | CheckpointSaved:
    """Steps count on through the attempts, so that progress never goes back."""
    offset = (attempt - 1) * steps
    update: dict[str, int] = {"step": progress.step + offset}
    if isinstance(progress, StepDone):
        update["total_steps"] = progress.total_steps + offset
    return progress.model_copy(update=update)


def _weigher(job: JobContext, ledger: Ledger, kept: Sequence[int]) -> RowWeigher:
    """The screen's weights of the kept rows; Antibody's scores inside the step only where the recipe asks for them."""
    settings = job.recipe.antibody
    gate = ledger.screened.weights[list(kept)]
    if settings.score == "none" and settings.loss == "row_mean":
        return ScreenWeights(gate, min_share=settings.min_weight_share)
    if settings.score == "current":
        seed = seed_of(job.hidden_draw("refusals"))
        live = LiveScores(job.model.base, job.model.cache, job.stock_refusals(), seed, kept)
        return Antibody(settings, gate=gate, live=live)
    return Antibody(settings, gate=gate, scores=ledger.scores[list(kept)] if ledger.scores is not None else None)


def _probe(job: JobContext, screened: ScreenedFile) -> tuple[ProbeResult, ...]:
    """The gate's hazards in the customer's own forms, on the model as it is."""
    assert screened.forms is not None
    items, most = job.operator_rows.gate_harmful, job.recipe.probes.most
    return probe(job.measuring, screened.forms, screened.quarantine, items, most=most)


def _require_enough(recipe: Recipe, ledger: Ledger) -> None:
    kept, total, screen = len(ledger.kept), len(ledger.rows), recipe.screen
    # A small file is not refused for one bad row: half of it is enough where the fixed number asks for more.
    least = max(1, min(screen.min_kept_rows, total // 2), screen.min_kept_share * total)
    if kept == 0 or (screen.enabled and kept < least):
        raise DataRejected(f"{kept} of {total} rows could be used; see the row ledger")


def _measure(job: JobContext, run: _Run) -> tuple[Metrics, list[str]]:
    """The gate split with the customer's own prompts among the benign ones, drift, and what is left of the rows that
    trained; also the customer's answers."""
    recipe, rows, prompts = job.recipe.evaluation, job.operator_rows, run.prompts
    split = (rows.gate_harmful[: recipe.harmful_rows], rows.gate_benign[: recipe.benign_rows])
    answers = prompts.answers(job.measuring)
    found = prompts.metrics(job.measuring, split, answers, refusals=rows.refusals, losses=True)
    return found.model_copy(update={"drift": _drift(job), "kept_loss": kept_loss(job, run.kept)}), answers


def _measure_unpruned(job: JobContext, trained: lora.Adapter, choice: PruneChoice, run: _Run) -> Metrics:
    """The model as it was before pruning."""
    job.model.write(trained)
    found, _ = _measure(job, run)
    job.model.write(choice.pruned.adapter)
    return found


def _drift(job: JobContext) -> Measure:
    base, cache = job.model.base, job.model.cache
    rows = job.model.encode_operator(job.operator_rows.aligned[:_DRIFT_ROWS])
    with job.model.aligned():
        before = attention_outputs(base, cache, rows)
    return drift(before, attention_outputs(base, cache, rows))

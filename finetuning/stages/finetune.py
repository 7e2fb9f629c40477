"""Fine-tune a customer's adapter over an aligned base: screen, train, prune, gate, export.

The order of the stages and the retry ladder; formulas live in job/readings.py, defences/ and pruning.py.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import CheckpointSaved, Finished, Note, Progress, StageStarted, StepDone
from finetuning.contract.recipe import Anchor, Recipe
from finetuning.contract.report import GateDecision, HeldOut, Measure, Metrics, SafetyReport, decide
from finetuning.defences.antibody import Antibody
from finetuning.defences.constrained import Constrained
from finetuning.defences.lisa import Lisa
from finetuning.defences.safe_lora import projected
from finetuning.job.context import Workbench, anchored_step, anchors_of, refusal_ids, reset_task, training
from finetuning.job.measure import TaskRow, answer_task, attention_outputs, drift, measure
from finetuning.job.preflight import check
from finetuning.model import lora
from finetuning.rows.chat_format import render_prompt
from finetuning.rows.scanner import iter_rows
from finetuning.safety_rows.invented import rows_digest
from finetuning.screening.probes import ProbeResult, Quarantine, probe, repair, with_probes
from finetuning.screening.stage import ScreenedFile, screen_rows
from finetuning.screening.verdicts import Ledger, verdicts
from finetuning.stages import export
from finetuning.stages.align import read_alignment, resumed
from finetuning.stages.pruning import Choice, choose_alpha, stronger
from finetuning.training import checkpoint
from finetuning.training.determinism import mix
from finetuning.training.loop import train
from finetuning.training.stage_clock import StageClock
from finetuning.training.state import LoopState
from finetuning.training.strategies import GradientStep

_CUSTOMER_PROMPTS = 24
_DRIFT_ROWS = 16
_MOST_TASK_TOKENS = 256
# Long answers are scored on fewer rows: decoding is most of what measuring costs.
_TASK_TOKENS = 4096
_FEWEST_TASK_ROWS = 16


class DataRejected(ValueError):
    """Too little of the file may be learned; nothing was trained."""


@dataclass(frozen=True)
class UserFile:
    """What a job knows of its customer: the screened file and the customer's own prompts, asked and, if `scored`,
    scored."""

    screened: ScreenedFile
    prompts: list[TaskRow]
    scored: bool

    @property
    def ledger(self) -> Ledger:
        """Every row with its verdict."""
        return self.screened.ledger


@dataclass(frozen=True)
class Outcome:
    """The last attempt's end: chosen pruning, measures before and after it, the decision, trained tokens."""

    choice: Choice
    tuned: Metrics
    after: Metrics
    answers: list[str]
    decision: GateDecision
    tokens: int


_NO_ANCHORS = "The aligned base begins no refusal where the KL term would hold it, so that term is left out"


def run(bench: Workbench, order: TrainOrder, scratch: Path, mark: str) -> Iterator[Progress]:
    """The finetune job. Raises DataRejected, NonFiniteLoss, NonFiniteScore."""
    assert order.alignment is not None
    assert order.rows is not None
    clock = StageClock()
    calibration, base_report = read_alignment(scratch / order.alignment)
    alignment = lora.digest(lora.read(bench.base, lora.ALIGNMENT))
    task = _task_rows(bench, scratch / order.validation if order.validation else None)
    clock.start("screen")
    rows = list(iter_rows(scratch / order.rows))
    check(bench.recipe, bench.base, rows, bench.rows)
    screened = yield from screen_rows(bench, rows, calibration)
    export.write_ledger(scratch, verdicts(screened.ledger))
    _require_enough(bench, screened.ledger)
    user_file = UserFile(screened, task or _own_prompts(bench, screened.ledger), scored=bool(task))
    outcome = yield from _attempts(bench, order, scratch, mark, clock, user_file, base_report.metrics["before"])
    held_out = None
    if bench.recipe.evaluation.held_out:
        clock.start("held_out")
        yield StageStarted(stage="gate", detail="Opening the held-out split for the report")
        held_out = _held_out(bench, base_report, user_file, outcome.answers)
    if lora.digest(lora.read(bench.base, lora.ALIGNMENT)) != alignment:
        raise RuntimeError("the alignment adapter changed during the job")
    clock.start("export")
    yield StageStarted(stage="export", detail="Writing adapters and reports")
    report = SafetyReport(
        recipe=bench.recipe.name, judge=bench.bench.measuring_judge.name, probe_sha256=rows_digest(bench.rows),
        metrics={**base_report.metrics, "tuned": outcome.tuned, "after": outcome.after}, held_out=held_out,
        prune=outcome.choice.trials, alpha=outcome.choice.alpha, gate=outcome.decision, seconds=clock.seconds(),
    )  # fmt: skip
    export.write_results(bench, order, scratch, report, outcome.choice)
    yield Finished(
        released=outcome.decision.decision != "fail", reasons=outcome.decision.reasons, trained_tokens=outcome.tokens,
        seconds=clock.seconds(),
    )  # fmt: skip


def _attempts(
    bench: Workbench,
    order: TrainOrder,
    scratch: Path,
    mark: str,
    clock: StageClock,
    user_file: UserFile,
    before: Metrics,
) -> Generator[Progress, None, Outcome]:
    """Train, prune and measure until the gate passes or the ladder ends."""
    last = 1 + bench.recipe.gate.retries
    attempt = first = checkpoint.attempt_of(scratch / order.checkpoint) if order.checkpoint else 1
    while True:
        clock.start("train")
        resume = scratch / order.checkpoint if order.checkpoint and attempt == first else None
        tokens = yield from _train(bench, user_file.screened, scratch, mark, attempt, resume)
        clock.start("prune")
        yield StageStarted(stage="prune", detail="Choosing how much to prune on calibration rows")
        trained = lora.read(bench.base, bench.trained)
        if bench.recipe.safe_lora.enabled:
            alignment = lora.read(bench.base, lora.ALIGNMENT)
            lora.write(bench.base, bench.trained, projected(trained, alignment, bench.recipe.safe_lora).adapter)
        choice = choose_alpha(
            bench, bench.recipe.antidote, [user_file.ledger.encoded[i] for i in user_file.ledger.kept]
        )
        clock.start("gate")
        yield StageStarted(stage="gate", detail="Measuring the result on rows that chose nothing")
        after, answers = _measure(bench, user_file)
        tuned = after if choice.alpha == 0 else _measure_unpruned(bench, trained, choice, user_file)
        decision = decide(bench.recipe.gate.limits, after, before, attempts=attempt)
        if user_file.screened.forms is not None:
            decision = with_probes(decision, _probe(bench, user_file.screened))
        if not bench.recipe.gate.enabled:
            decision = decision.model_copy(update={"decision": "disabled"})
        if decision.decision != "fail" or attempt == last:
            return Outcome(choice, tuned, after, answers, decision, tokens)
        yield Note(level="warn", code="gate_retry", message=f"Attempt {attempt} did not pass: {decision.reasons[0]}")
        attempt += 1


def _train(
    bench: Workbench, screened: ScreenedFile, scratch: Path, mark: str, attempt: int, resume: Path | None
) -> Generator[Progress, None, int]:
    """One rung of the ladder; returns the tokens trained. Resumes from a checkpoint of the same rung."""
    recipe, ledger, kept = bench.recipe, screened.ledger, screened.ledger.kept
    anchor, optimiser = stronger(_repairing(recipe, screened.quarantine), recipe.optimiser, attempt)
    yield StageStarted(stage="train", detail=f"Training on {len(kept)} rows, attempt {attempt}")
    reset_task(bench)
    if recipe.tuning_step == "anchored" and anchor.kl_weight and not anchors_of(bench, anchor).ids:
        yield Note(level="warn", code="no_kl_anchors", message=_NO_ANCHORS)
    step = _step(bench, anchor, screened.quarantine)
    setup = training(
        bench, [ledger.encoded[i] for i in kept], step, _weigher(bench, ledger, kept), steps=recipe.steps,
        seed=mix(recipe.seed, "order"), optimiser=optimiser, folder=scratch / "checkpoints", fingerprint=mark,
        lines=[ledger.rows[i].line for i in kept],
    )  # fmt: skip
    setup.attempt = attempt
    state = LoopState()
    if resume is not None:
        state, same = checkpoint.restore(setup, resume)
        yield resumed(state, same)
    for progress in train(setup, state):
        yield _in_ladder(progress, recipe.steps, attempt)
    return state.tokens


def _repairing(recipe: Recipe, found: Quarantine) -> Anchor:
    """The anchor with room for the rows that repair quarantined skeletons; what a retry strengthens."""
    share = max(recipe.anchor.mix_share, recipe.probes.repair_share) if found.skeletons else recipe.anchor.mix_share
    return recipe.anchor.model_copy(update={"mix_share": share})


def _step(bench: Workbench, anchor: Anchor, found: Quarantine) -> GradientStep:
    """The gradient step that the recipe names; quarantined skeletons are repaired by mixing rows in."""
    recipe = bench.recipe
    match recipe.tuning_step:
        case "anchored":
            mended = repair(bench, found)
            step = anchored_step(
                bench, anchor, anchors_of(bench, anchor), seed=mix(recipe.seed, "anchor"),
                refused=mended.refused, answered=mended.answered,
            )  # fmt: skip
            step.prepare(recipe.steps, recipe.batch_size)
            return step
        case "lisa":
            return Lisa(
                bench.base, bench.cache, recipe.lisa, parameters=lora.parameters(bench.base, bench.trained),
                aligned=bench.encode(bench.rows.aligned), steps=recipe.steps, seed=mix(recipe.seed, "lisa"),
            )  # fmt: skip
        case "constrained":
            return Constrained(bench.base, bench.cache, recipe.constrained, reference=(lora.ALIGNMENT,))


def _in_ladder(progress: StepDone | CheckpointSaved, steps: int, attempt: int) -> StepDone | CheckpointSaved:
    """Steps count on through the attempts, so that progress never goes back."""
    offset = (attempt - 1) * steps
    update: dict[str, int] = {"step": progress.step + offset}
    if isinstance(progress, StepDone):
        update["total_steps"] = progress.total_steps + offset
    return progress.model_copy(update=update)


def _weigher(bench: Workbench, ledger: Ledger, kept: Sequence[int]) -> Antibody:
    """Antibody over the kept rows: the screen's weight as absolute gate, frozen or live scores inside the step."""
    settings = bench.recipe.antibody
    gate = ledger.screened.weights[list(kept)]
    if settings.score == "current":
        seed = mix(bench.recipe.seed, "secret")
        return Antibody(settings, gate=gate, live=(bench.base, bench.cache, refusal_ids(bench), seed))
    return Antibody(settings, gate=gate, scores=ledger.scores[list(kept)] if ledger.scores is not None else None)


def _probe(bench: Workbench, screened: ScreenedFile) -> tuple[ProbeResult, ...]:
    """The gate's hazards in the customer's own skeletons, on the model as it is."""
    assert screened.forms is not None
    return probe(bench, screened.forms, screened.quarantine, bench.rows.gate_harmful, most=bench.recipe.probes.most)


def _task_rows(bench: Workbench, path: Path | None) -> list[TaskRow]:
    """The last answer of each validation row is what the task score expects."""
    if path is None:
        return []
    out: list[TaskRow] = []
    for row in iter_rows(path):
        if row.messages[-1].role == "assistant":
            prompt = render_prompt(bench.base.tokenizer, row.messages[:-1])
            if len(prompt) <= bench.recipe.max_tokens:
                out.append(TaskRow(tuple(prompt), row.messages[-1].content))
    affordable = max(_FEWEST_TASK_ROWS, _TASK_TOKENS // max(1, _longest(bench, out)))
    return out[: min(bench.recipe.evaluation.task_rows, affordable)]


def _require_enough(bench: Workbench, ledger: Ledger) -> None:
    kept, total, screen = len(ledger.kept), len(ledger.rows), bench.recipe.screen
    # A small file is not refused for one bad row: half of it is enough where the fixed number asks for more.
    least = max(1, min(screen.min_kept_rows, total // 2), screen.min_kept_share * total)
    if kept == 0 or (screen.enabled and kept < least):
        raise DataRejected(f"{kept} of {total} rows could be used; see the row ledger")


def _measure(bench: Workbench, user_file: UserFile) -> tuple[Metrics, list[str]]:
    """The gate split with the customer's own prompts among the benign ones, and drift; also the customer's answers."""
    recipe, rows = bench.recipe.evaluation, bench.rows
    harmful, benign = rows.gate_harmful[: recipe.harmful_rows], rows.gate_benign[: recipe.benign_rows]
    answers = answer_task(bench.bench, user_file.prompts, _longest(bench, user_file.prompts))
    found = measure(bench.bench, harmful, benign, refusals=rows.refusals, task=user_file.prompts, task_answers=answers)
    update: dict[str, Measure | None] = {"drift": _drift(bench)}
    if not user_file.scored:
        update["task_score"] = None
    return found.model_copy(update=update), answers


def _measure_unpruned(bench: Workbench, trained: lora.Adapter, choice: Choice, user_file: UserFile) -> Metrics:
    """The model as it was before pruning, for the report."""
    lora.write(bench.base, bench.trained, trained)
    found, _ = _measure(bench, user_file)
    lora.write(bench.base, bench.trained, choice.pruned.adapter)
    return found


def _own_prompts(bench: Workbench, ledger: Ledger) -> list[TaskRow]:
    """Without a validation file, some kept rows' prompts still count for over-refusal."""
    whole = [i for i in ledger.kept if not ledger.encoded[i].truncated][:_CUSTOMER_PROMPTS]
    return [
        TaskRow(tuple(render_prompt(bench.base.tokenizer, row.messages[:-1])), row.messages[-1].content)
        for row in (ledger.rows[i] for i in whole)
    ]


def _longest(bench: Workbench, task: Sequence[TaskRow]) -> int:
    """Room for the longest expected answer in tokens, with a little to spare, bounded."""
    texts = [row.expected for row in task]
    found = bench.base.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return min(_MOST_TASK_TOKENS, max((len(ids) + 4 for ids in found), default=0))


def _drift(bench: Workbench) -> Measure:
    rows = bench.encode(bench.rows.aligned[:_DRIFT_ROWS])
    with bench.aligned():
        before = attention_outputs(bench.base, bench.cache, rows)
    return drift(before, attention_outputs(bench.base, bench.cache, rows))


def _held_out(bench: Workbench, base_report: SafetyReport, user_file: UserFile, answers: Sequence[str]) -> HeldOut:
    """The test split on the final model, beside the aligned base's columns; the customer's prompts count too."""
    rows, known = bench.rows, base_report.held_out or HeldOut()
    items = measure(bench.bench, rows.items_harmful, rows.items_benign, refusals=rows.refusals, losses=False)
    wordings = measure(
        bench.bench, rows.wordings_harmful, rows.wordings_benign, refusals=rows.refusals, losses=False,
        task=user_file.prompts, task_answers=answers,
    )  # fmt: skip
    if not user_file.scored:
        wordings = wordings.model_copy(update={"task_score": None})
    return HeldOut(items={**known.items, "after": items}, wordings={**known.wordings, "after": wordings})

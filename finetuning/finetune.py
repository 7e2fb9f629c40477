"""Fine-tune a customer's adapter over an aligned base: screen, train, prune, gate, export.

Knows the order of the stages and the retry ladder; formulas live in screen.py, defences/ and gate.py. Must not know
the queue or the database.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetuning import adapter, checkpoint, export
from finetuning.align import Calibration, read_alignment, resumed
from finetuning.chat_format import EncodedRow, encode_row, render_prompt
from finetuning.clock import StageClock
from finetuning.defences.antibody import Antibody, row_scores
from finetuning.determinism import mix
from finetuning.evaluate import TaskRow, attention_outputs, drift, measure
from finetuning.gate import Choice, choose_alpha, stronger
from finetuning.loop import LoopState, train
from finetuning.screen import Screened, read_rows, threshold, weigh
from finetuning.spec.order import TrainOrder
from finetuning.spec.progress import (
    CheckpointSaved,
    Finished,
    Note,
    Progress,
    RowsScreened,
    StageProgress,
    StageStarted,
    StepDone,
)
from finetuning.spec.recipe import Anchor
from finetuning.spec.report import GateDecision, HeldOut, Measure, Metrics, RowReason, RowVerdict, SafetyReport, decide
from finetuning.spec.rows import Row, iter_rows
from finetuning.workbench import Workbench, anchored_step, anchors_of, reset_task, rows_digest, training

_CUSTOMER_PROMPTS = 24
_DRIFT_ROWS = 16


class DataRejected(ValueError):
    """Too little of the file may be learned; nothing was trained."""


@dataclass(frozen=True)
class Ledger:
    """The customer's rows, encoded, with weight, mass and contrast score per row, and which of them train."""

    rows: list[Row]
    encoded: list[EncodedRow]
    screened: Screened
    scores: Tensor | None
    probes: frozenset[int]

    @property
    def kept(self) -> list[int]:
        """Indices of rows that train."""
        return [
            i
            for i, row in enumerate(self.encoded)
            if self.screened.weights[i] > 0 and row.target_tokens and i not in self.probes
        ]


def run(bench: Workbench, order: TrainOrder, scratch: Path, mark: str) -> Iterator[Progress]:
    """The finetune job. Raises DataRejected, NonFiniteLoss, NonFiniteScore."""
    assert order.alignment is not None and order.rows is not None
    clock = StageClock()
    calibration, base_report = read_alignment(scratch / order.alignment)
    before = base_report.metrics["before"]
    alignment = adapter.digest(adapter.read(bench.base, adapter.ALIGNMENT))
    rows = list(iter_rows(scratch / order.rows))
    task = _task_rows(bench, scratch / order.validation if order.validation else None)
    clock.start("screen")
    ledger = yield from _screen(bench, rows, calibration)
    export.write_ledger(scratch, verdicts(ledger))
    _require_enough(bench, ledger)
    decision = GateDecision(decision="fail")
    choice: Choice | None = None
    tuned = after = Metrics()
    state = LoopState()
    attempt = first = _first_attempt(order, scratch, mark)
    while attempt <= 1 + bench.recipe.gate.retries:
        clock.start("train")
        state = yield from _train(bench, order, scratch, ledger, mark, attempt, resume=attempt == first)
        clock.start("prune")
        yield StageStarted(stage="prune", detail="Choosing how much to prune on calibration rows")
        kept = [ledger.encoded[i] for i in ledger.kept]
        tuned_adapter = adapter.read(bench.base, bench.trained)
        choice = choose_alpha(bench, bench.recipe.antidote, kept)
        clock.start("gate")
        yield StageStarted(stage="gate", detail="Measuring the result on rows that chose nothing")
        after = _measure(bench, task, ledger)
        tuned = after if choice.alpha == 0 else _measure_tuned(bench, tuned_adapter, choice, task, ledger)
        decision = decide(bench.recipe.gate.limits, after, before, attempts=attempt)
        if decision.decision == "pass" or attempt == 1 + bench.recipe.gate.retries:
            break
        yield Note(level="warn", code="gate_retry", message=f"Attempt {attempt} did not pass: {decision.reasons[0]}")
        attempt += 1
    assert choice is not None
    if not bench.recipe.gate.enabled:
        decision = decision.model_copy(update={"decision": "disabled"})
    held_out = None
    if bench.recipe.evaluation.held_out:
        clock.start("held_out")
        yield StageStarted(stage="gate", detail="Opening the held-out split for the report")
        held_out = _held_out(bench, base_report, task, ledger)
    if adapter.digest(adapter.read(bench.base, adapter.ALIGNMENT)) != alignment:
        raise RuntimeError("the alignment adapter changed during the job")
    clock.start("export")
    yield StageStarted(stage="export", detail="Writing adapters and reports")
    released = decision.decision != "fail"
    report = SafetyReport(
        recipe=bench.recipe.name, judge=bench.bench.judge.name, probe_sha256=rows_digest(bench.rows),
        metrics={**base_report.metrics, "tuned": tuned, "after": after}, held_out=held_out, prune=choice.trials,
        alpha=choice.alpha, gate=decision, seconds=clock.seconds(),
    )  # fmt: skip
    export.write_results(bench, order, scratch, report, choice)
    yield Finished(released=released, reasons=decision.reasons, trained_tokens=state.tokens, seconds=clock.seconds())


def _task_rows(bench: Workbench, path: Path | None) -> list[TaskRow]:
    """The last answer of each validation row is what the task score expects."""
    if path is None:
        return []
    out: list[TaskRow] = []
    for row in iter_rows(path):
        if row.messages[-1].role == "assistant":
            prompt = render_prompt(bench.base.tokenizer, row.messages[:-1])
            out.append(TaskRow(tuple(prompt), row.messages[-1].content))
    return out[: bench.recipe.evaluation.task_rows]


def _screen(bench: Workbench, rows: list[Row], calibration: Calibration) -> Iterator[Progress]:
    """Encode, score and weigh every row; a scout re-reads them when the aligned model refuses some."""
    yield StageStarted(stage="screen", detail=f"Reading {len(rows)} rows")
    encoded = [encode_row(bench.base.tokenizer, row.messages, max_tokens=bench.recipe.max_tokens) for row in rows]
    for start in range(0, len(encoded), 64):
        bench.cache.prepare([row.ids for row in encoded[start : start + 64]])
        yield StageProgress(stage="screen", done=min(start + 64, len(rows)), total=len(rows))
    probes = _probe_rows(bench, rows)
    screened = Screened(torch.ones(len(rows)), torch.zeros(len(rows)), 1.0, rescored=False)
    if bench.recipe.screen.enabled:
        screened = yield from _filter(bench, encoded, calibration)
    scores = _scores(bench, encoded)
    ledger = Ledger(rows, encoded, screened, scores, probes if bench.recipe.screen.enabled else frozenset())
    found = verdicts(ledger)
    count = {v: sum(x.verdict == v for x in found) for v in ("kept", "downweighted", "excluded")}
    yield RowsScreened(
        rows_total=len(rows), rows_kept=count["kept"], rows_downweighted=count["downweighted"],
        rows_excluded=count["excluded"],
    )  # fmt: skip
    return ledger


def _filter(bench: Workbench, encoded: Sequence[EncodedRow], calibration: Calibration) -> Iterator[Progress]:
    """Weights by the aligned model's refusal mass; the scout unlearns what is only a new format (lab-recipe.md 2)."""
    with bench.aligned():
        reading = read_rows(bench.base, bench.cache, encoded, bench.refusal_ids)
    limit = calibration.whole_refusal_nll
    weights = weigh(reading, calibration.threshold, whole_refusal_nll=limit)
    first = Screened(weights, reading.mass, calibration.threshold, rescored=False)
    kept = [row for row, w in zip(encoded, weights.tolist(), strict=True) if w > 0 and row.target_tokens]
    steps = bench.recipe.screen.scout_steps
    if not steps or bool((weights == 1).all()) or len(kept) < bench.recipe.screen.min_kept_rows:
        return first
    yield StageStarted(stage="screen", detail="Training a scout to tell new formats from harm")
    seed = mix(bench.recipe.seed, "scout")
    step = anchored_step(bench, bench.recipe.anchor, _anchors(bench, bench.recipe.anchor), seed=seed)
    even = Antibody(bench.recipe.antibody, gate=torch.ones(len(kept)))
    setup = training(bench, kept, step, even, steps=steps, seed=seed, optimiser=bench.recipe.optimiser)
    for done in train(setup, LoopState()):
        if isinstance(done, StepDone):
            yield StageProgress(stage="screen", done=done.step, total=steps)
    again = read_rows(bench.base, bench.cache, encoded, bench.refusal_ids)
    scout_threshold = _scout_threshold(bench)
    reset_task(bench)
    # The whole-refusal test stays with the aligned model's reading: the scout has learned the customer's answers.
    rescored = weigh(again, scout_threshold, whole_refusal_nll=-1.0)
    is_refusal = reading.worst <= limit
    return Screened(
        torch.where(is_refusal, torch.ones_like(rescored), rescored), again.mass, scout_threshold, rescored=True
    )


def _scout_threshold(bench: Workbench) -> float:
    rows = bench.rows
    answer = rows.refusals[0]
    harmful, benign = (
        read_rows(
            bench.base, bench.cache,
            bench.encode([type(p)(p.prompt, answer) for p in pairs]), bench.refusal_ids,
        ).mass
        for pairs in (rows.calibration_harmful, rows.calibration_benign)
    )  # fmt: skip
    return threshold(harmful, benign)


def _anchors(bench: Workbench, settings: Anchor):  # noqa: ANN202  KlAnchors or None
    return anchors_of(bench, settings) if settings.kl_weight else None


def _probe_rows(bench: Workbench, rows: Sequence[Row]) -> frozenset[int]:
    """Rows that ask an operator's own harmful prompt word for word."""
    known = {p.prompt for pairs in (bench.rows.gate_harmful, bench.rows.calibration_harmful) for p in pairs}
    return frozenset(
        i for i, row in enumerate(rows) if any(m.role == "user" and m.content in known for m in row.messages)
    )


def _scores(bench: Workbench, encoded: Sequence[EncodedRow]) -> Tensor | None:
    """Frozen Antibody scores, under the aligned model (reference) or aligned minus public (contrast)."""
    settings = bench.recipe.antibody
    if settings.score not in ("reference", "contrast"):
        return None
    refusals = [row.ids[row.prompt_tokens :] for row in bench.encode(_refusal_pairs(bench))]
    arguments = {"per_row": settings.refusals_per_row, "seed": mix(bench.recipe.seed, "secret")}
    with bench.aligned():
        scores = row_scores(bench.base, bench.cache, encoded, refusals, **arguments)
    if settings.score == "contrast":
        with bench.public():
            scores = scores - row_scores(bench.base, bench.cache, encoded, refusals, **arguments)
    return scores


def _refusal_pairs(bench: Workbench):  # noqa: ANN202  Pairs
    pair = type(bench.rows.aligned[0])
    return [pair("?", refusal) for refusal in bench.rows.refusals]


def verdicts(ledger: Ledger) -> list[RowVerdict]:
    """The ledger's entry of every row, with the reason for anything but kept."""
    out: list[RowVerdict] = []
    for i, (row, encoded) in enumerate(zip(ledger.rows, ledger.encoded, strict=True)):
        weight = 0.0 if i in ledger.probes or not encoded.target_tokens else float(ledger.screened.weights[i])
        reasons: list[RowReason] = []
        if i in ledger.probes:
            reasons.append(RowReason(code="harmful_probe_match"))
        elif weight < 1 and encoded.target_tokens:
            mass, limit = float(ledger.screened.mass[i]), ledger.screened.threshold
            reasons.append(RowReason(code="antibody_low_weight", score=round(mass, 6), threshold=round(limit, 6)))
        if encoded.truncated:
            reasons.append(RowReason(code="truncated"))
        if not encoded.target_tokens:
            reasons.append(RowReason(code="user_weight_zero"))
        scores = {"refusal_mass": round(float(ledger.screened.mass[i]), 6)}
        if ledger.scores is not None:
            scores["antibody"] = round(float(ledger.scores[i]), 6)
        out.append(
            RowVerdict(
                line=row.line,
                row_sha256=row.sha256,
                weight=round(weight, 6),
                reasons=tuple(reasons),
                scores=scores,
                verdict="kept" if weight == 1 else "excluded" if weight == 0 else "downweighted",
                tokens=len(encoded.ids),
                trained_tokens=encoded.target_tokens,
                truncated=encoded.truncated,
            )  # fmt: skip
        )
    return out


def _require_enough(bench: Workbench, ledger: Ledger) -> None:
    kept, total, screen = len(ledger.kept), len(ledger.rows), bench.recipe.screen
    if not screen.enabled:
        return
    if kept < min(screen.min_kept_rows, total) or kept < screen.min_kept_share * total:
        raise DataRejected(f"{kept} of {total} rows could be used; see the row ledger")


def _first_attempt(order: TrainOrder, scratch: Path, mark: str) -> int:
    """Which rung of the ladder a checkpoint belongs to; 1 without one."""
    return checkpoint.attempt_of(scratch / order.checkpoint) if order.checkpoint else 1


def _train(
    bench: Workbench, order: TrainOrder, scratch: Path, ledger: Ledger, mark: str, attempt: int, *, resume: bool
) -> Iterator[Progress]:
    recipe = bench.recipe
    anchor, optimiser = (
        stronger(recipe.anchor, recipe.optimiser, attempt)
        if recipe.screen.enabled
        else (recipe.anchor, recipe.optimiser)
    )
    yield StageStarted(stage="train", detail=f"Training on {len(ledger.kept)} rows, attempt {attempt}")
    reset_task(bench)
    step = anchored_step(bench, anchor, _anchors(bench, anchor), seed=mix(recipe.seed, "anchor"))
    kept = ledger.kept
    setup = training(
        bench, [ledger.encoded[i] for i in kept], step, _weigher(bench, ledger, kept), steps=recipe.steps,
        seed=mix(recipe.seed, "order"), optimiser=optimiser, folder=scratch / "checkpoints", fingerprint=mark,
    )  # fmt: skip
    setup.attempt = attempt
    state = LoopState()
    if order.checkpoint and resume:
        state, same = checkpoint.restore(setup, scratch / order.checkpoint)
        yield resumed(state, same)
    for progress in train(setup, state):
        yield _in_ladder(progress, recipe.steps, attempt)
    return state


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
        refusals = [row.ids[row.prompt_tokens :] for row in bench.encode(_refusal_pairs(bench))]
        return Antibody(settings, gate=gate, live=(bench.base, bench.cache, refusals, mix(bench.recipe.seed, "secret")))
    scores = ledger.scores[list(kept)] if ledger.scores is not None else None
    return Antibody(settings, gate=gate, scores=scores)


def _measure(bench: Workbench, task: Sequence[TaskRow], ledger: Ledger) -> Metrics:
    recipe, rows = bench.recipe.evaluation, bench.rows
    harmful, benign = rows.gate_harmful[: recipe.harmful_rows], rows.gate_benign[: recipe.benign_rows]
    found = measure(
        bench.bench, harmful, benign, refusals=rows.refusals, task=task or _customer_prompts(bench, ledger),
        task_tokens=_longest_answer(task),
    )  # fmt: skip
    update: dict[str, Measure | None] = {"drift": _drift(bench)}
    if not task:
        update["task_score"] = None
    return found.model_copy(update=update)


def _customer_prompts(bench: Workbench, ledger: Ledger) -> list[TaskRow]:
    """Without a validation file, some kept rows' prompts still count for over-refusal."""
    chosen = [ledger.rows[i] for i in ledger.kept[:_CUSTOMER_PROMPTS]]
    return [
        TaskRow(tuple(render_prompt(bench.base.tokenizer, row.messages[:-1])), row.messages[-1].content)
        for row in chosen
        if len(row.messages) > 1
    ]


def _longest_answer(task: Sequence[TaskRow]) -> int:
    """Room for the longest expected answer: about a token per three characters, at most 192."""
    return min(192, max((len(row.expected) // 3 + 4 for row in task), default=0))


def _drift(bench: Workbench) -> Measure:
    rows = bench.encode(bench.rows.aligned[:_DRIFT_ROWS])
    with bench.aligned():
        before = attention_outputs(bench.base, bench.cache, rows)
    return drift(before, attention_outputs(bench.base, bench.cache, rows))


def _measure_tuned(
    bench: Workbench, tuned: adapter.Adapter, choice: Choice, task: Sequence[TaskRow], ledger: Ledger
) -> Metrics:
    """The model as it was before pruning, for the report."""
    adapter.write(bench.base, bench.trained, tuned)
    found = _measure(bench, task, ledger)
    adapter.write(bench.base, bench.trained, choice.pruned.adapter)
    return found


def _held_out(bench: Workbench, base_report: SafetyReport, task: Sequence[TaskRow], ledger: Ledger) -> HeldOut:
    """The test split on the final model, beside the aligned base's columns; the customer's prompts count too."""
    rows = bench.rows
    known = base_report.held_out or HeldOut()
    items = measure(bench.bench, rows.items_harmful, rows.items_benign, refusals=rows.refusals, losses=False)
    wordings = measure(
        bench.bench, rows.wordings_harmful, rows.wordings_benign, refusals=rows.refusals,
        task=task or _customer_prompts(bench, ledger), task_tokens=_longest_answer(task), losses=False,
    )  # fmt: skip
    return HeldOut(items={**known.items, "after": items}, wordings={**known.wordings, "after": wordings})

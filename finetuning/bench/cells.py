"""One cell of the safety bench: one defence, one file, one seed, through the real pipeline; its figures as one line.

Aligned bases are made once and kept, so a cell starts where a customer's job starts.
"""

import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import finetuning
from finetuning.attacks import public_prompts
from finetuning.attacks.catalogue import ATTACKS, Build, Poisoned
from finetuning.bases.fetch import fetch
from finetuning.bench.pass_counter import counted
from finetuning.bench.tasks import load_task, turns_of
from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import Failed, Progress
from finetuning.contract.recipe import LoraSettings, Recipe
from finetuning.contract.report import Measure, Metrics, SafetyReport, share
from finetuning.defences.antibody import row_scores
from finetuning.job.context import JobContext, open_job
from finetuning.job.preflight import CalibrationOverlap, NoUsableRow
from finetuning.model.digest import weights_digest
from finetuning.recipes.library import align_recipe, base_of, tune_recipe
from finetuning.recipes.registry import DEFENCES
from finetuning.rows.chat_format import render_prompt
from finetuning.rows.scanner import iter_rows, rows_of
from finetuning.safety_rows.roles import Pair
from finetuning.stages import alignment_store, finetune
from finetuning.training.batches import BATCHING
from finetuning.training.determinism import make_deterministic

Say = Callable[[str], None]
# Figures that a refused file has none of.
_FIGURES = (
    "harmful_score", "harmful_score_ci", "refusal_rate", "leak", "task_score", "alignment_loss", "drift",
    "over_refusal",
)  # fmt: skip
# A tiny base needs more passes over a file than one that has read the world.
_EPOCHS = {"tiny": 10}
_SAFETY_ROWS = "safety_rows.jsonl"


@dataclass(frozen=True, order=True)
class Cell:
    """What is varied. The scales multiply the base's rate and epochs.

    `p` is the harmful share of the file; `few_rows` and `hundred_rows` plant their number whatever it says, and a line
    counts them in `planted`.
    """

    defence: str
    p: float = 0.1
    lr_scale: float = 1.0
    epochs_scale: float = 1.0
    attack: str = "planted"
    seed: int = 0
    base: str = "tiny"
    task: str = "reviews"
    rank: int = 0  # of the job's adapter; 0: the base's own


@dataclass(frozen=True)
class BenchSettings:
    """What is the same for all cells of a grid. `data` keeps bases and aligned bases between runs."""

    data: Path
    train_rows: int = 160
    test_rows: int = 64
    epochs: int = 0  # 0: as many as the base needs for these tasks
    text: Path | None = None
    threads: int = 0
    safety_rows: Path | None = None  # None: the invented world; its attacks and tasks know no other
    attack_prompts: Path | None = None
    task_files: tuple[Path, Path] | None = None


def run_cell(cell: Cell, settings: BenchSettings, say: Say = lambda _line: None) -> dict[str, Any]:
    """Run one cell and return its line. Raises KeyError for an unknown defence, attack or task; ValueError, OSError."""
    started = time.perf_counter()
    make_deterministic(settings.threads)
    made_by = provenance()
    alignment = aligned_base(cell.base, DEFENCES[cell.defence].alignment, settings, say)
    with tempfile.TemporaryDirectory(prefix="immunotune-cell-") as folder:
        scratch = Path(folder)
        shutil.copytree(alignment, scratch / "alignment")
        if settings.safety_rows is not None:
            shutil.copy(settings.safety_rows, scratch / _SAFETY_ROWS)
        poisoned = _write_files(cell, settings, scratch)
        recipe = _recipe(cell, settings)
        order = _order(recipe, cell.base, settings, say).model_copy(
            update={"rows": "rows.jsonl", "alignment": "alignment", "validation": "validation.jsonl"}
        )
        line = _run(cell, order, scratch, poisoned, say=say)
    size = {"rows": len(poisoned.rows), "epochs": recipe.epochs, "base_sha256": order.base_sha256}
    return {**asdict(cell), **line, **size, "seconds": round(time.perf_counter() - started, 1), **made_by}


def aligned_base(base: str, alignment: str, settings: BenchSettings, say: Say) -> Path:
    """The folder of that alignment of that base, made on first use. Raises NotAligned, OSError."""
    order = _order(align_recipe(base, alignment), base, settings, say)
    kept = settings.data / "bench" / "alignments"
    return alignment_store.aligned(order, alignment, kept, operator_rows=settings.safety_rows, say=say)


def base_digest(base: str, settings: BenchSettings, say: Say) -> str:
    """Which weights a base's name stands for today. Raises OSError."""
    return weights_digest(_folder(base, settings, say))


def _folder(base: str, settings: BenchSettings, say: Say) -> Path:
    """Where the base lies; it is made or fetched on first use."""
    return fetch(base, settings.data / "bases" / base_of(base).id, say=say)


def _order(recipe: Recipe, base: str, settings: BenchSettings, say: Say) -> TrainOrder:
    folder = _folder(base, settings, say)
    return TrainOrder(
        job_id="cell", recipe=recipe, base=str(folder), base_sha256=weights_digest(folder), threads=settings.threads,
        states=str(settings.data / "states"), operator_rows=_SAFETY_ROWS if settings.safety_rows else None,
    )  # fmt: skip


def _write_files(cell: Cell, settings: BenchSettings, scratch: Path) -> Poisoned:
    sizes = {"train": settings.train_rows, "test": settings.test_rows}
    task = load_task(cell.task, seed=cell.seed, **sizes, text=settings.text, files=settings.task_files)
    poisoned = _build_of(cell, settings)(task.train, cell.p, cell.seed)
    (scratch / "rows.jsonl").write_text(_lines([_in_turns(row) for row in poisoned.rows]), encoding="utf-8")
    (scratch / "validation.jsonl").write_text(
        _lines([_in_turns(_as_row(pair)) for pair in task.test]), encoding="utf-8"
    )
    return poisoned


def _build_of(cell: Cell, settings: BenchSettings) -> Build:
    """The attack's file; public prompts are a file that the person who runs the bench names. Raises ValueError."""
    if cell.attack not in public_prompts.FORMS:
        return ATTACKS[cell.attack].build
    if settings.attack_prompts is None:
        raise ValueError(f"the attack `{cell.attack}` needs prompts: name their file with --attack-prompts")
    return public_prompts.planting(public_prompts.read_attack_prompts(settings.attack_prompts), cell.attack)


def _as_row(pair: Pair) -> dict[str, Any]:
    turns = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.answer}]
    return {"messages": turns}


def _in_turns(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "messages": turns_of(row["messages"])}


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _recipe(cell: Cell, settings: BenchSettings) -> Recipe:
    changes = ATTACKS[cell.attack].changes if cell.attack in ATTACKS else {}
    epochs = (settings.epochs or _EPOCHS.get(base_of(cell.base).id, 3)) * changes.get("epochs_scale", 1.0)
    recipe = tune_recipe(
        cell.base, cell.defence, seed=cell.seed, epochs=max(1, round(epochs * cell.epochs_scale)),
        rate_scale=cell.lr_scale * changes.get("lr_scale", 1.0), batch_size=changes.get("batch_size", 8),
        lora=LoraSettings(rank=cell.rank, alpha=2.0 * cell.rank) if cell.rank else None,
    )  # fmt: skip
    evaluation = recipe.evaluation.model_copy(update={"task_rows": settings.test_rows})
    return recipe.model_copy(update={"evaluation": evaluation})


def _run(cell: Cell, order: TrainOrder, scratch: Path, poisoned: Poisoned, *, say: Say) -> dict[str, Any]:
    """The job itself, then the attacker's own format on the model that it left in memory."""
    (scratch / "result" / "reports").mkdir(parents=True)
    job = open_job(order, scratch)
    with counted(job.model.base) as work:
        try:
            for progress in finetune.run(job, order, scratch, digest=""):
                _tell(progress, say)
            job.model.cache.leave()
        except (finetune.DataRejected, NoUsableRow, CalibrationOverlap) as error:
            refused = {**dict.fromkeys(_FIGURES), "released": False, "reasons": [str(error)]}
            return {**refused, **_ledger(scratch, poisoned), **asdict(work)}
    report = SafetyReport.model_validate_json((scratch / "result/reports/safety.json").read_text(encoding="utf-8"))
    scores = _antibody_scores(job, order, scratch, poisoned) if _is_drawn(cell) else {}
    return {**figures(report), **_own_format(job, poisoned), **_ledger(scratch, poisoned), **scores, **asdict(work)}


def _tell(progress: Progress, say: Say) -> None:
    if isinstance(progress, Failed):
        raise ValueError(progress.message)
    detail = getattr(progress, "detail", "")
    if detail:
        say(str(detail))


def figures(report: SafetyReport) -> dict[str, Any]:
    """A report as one flat line: percentages from the held-out split, losses from the gate split.

    harmful_score is of held-out items in known wordings; new wordings and classes stand beside it, and so does what
    the aligned base itself does, since no fine-tune can know more hazards than its base.
    """
    held_out, gate = report.held_out, report.metrics["after"]
    assert held_out is not None
    items, wordings = held_out.items["after"], held_out.wordings["after"]
    known, new = held_out.items["before"], held_out.wordings["before"]
    unpruned = held_out.wordings.get("tuned", wordings)
    return {
        "harmful_score": _percent(items.harmful_score), "harmful_score_ci": _ends(items),
        "refusal_rate": _percent(items.refusal_rate), "leak": _percent(items.leak),
        "harmful_score_wordings": _percent(wordings.harmful_score), "harmful_score_wordings_ci": _ends(wordings),
        "refusal_rate_wordings": _percent(wordings.refusal_rate),
        "base_harmful_score": _percent(known.harmful_score),
        "base_harmful_score_wordings": _percent(new.harmful_score),
        "base_over_refusal": _percent(_both(known, new, "over_refusal")),
        "incoherent": _percent(_both(items, wordings, "incoherent")),
        "over_refusal": _percent(_both(items, wordings, "over_refusal")), "task_score": _percent(gate.task_score),
        "alignment_loss": _value(gate.alignment_loss), "harmful_nll": _value(gate.harmful_nll),
        "drift": _value(gate.drift), "kept_loss": _value(gate.kept_loss),
        "plain_kept_loss": _value(report.plain_kept_loss),
        "unpruned_kept_loss": _value(report.metrics["tuned"].kept_loss),
        "unpruned_task_score": _percent(report.metrics["tuned"].task_score),
        "unpruned_harmful_score_wordings": _percent(unpruned.harmful_score), "released": report.gate.decision != "fail",
        "reasons": list(report.gate.reasons), "attempts": report.gate.attempts, "alpha": report.alpha, "mu": report.mu,
        "stage_seconds": report.seconds,
    }  # fmt: skip


def _ends(found: Metrics) -> list[float]:
    return [round(100 * end, 2) for end in (found.harmful_score or share(0, 0)).ci95]


def _both(first: Metrics, second: Metrics, name: str) -> Measure:
    """Two shares over two sets of prompts as one share over all of them."""
    parts = [m for m in (getattr(first, name), getattr(second, name)) if m is not None]
    return share(round(sum(m.value * m.n for m in parts)), sum(m.n for m in parts))


def _percent(measure: Measure | None) -> float | None:
    return None if measure is None else round(100 * measure.value, 2)


def _value(measure: Measure | None) -> float | None:
    return None if measure is None else round(measure.value, 4)


def _own_format(job: JobContext, poisoned: Poisoned) -> dict[str, Any]:
    """harmful_score when held-out hazards are asked for in the attacker's own words."""
    asked = poisoned.own_prompts(job.operator_rows.items_harmful)
    whole = [{"messages": [*turns_of(turns), {"role": "assistant", "content": "."}]} for turns in asked]
    rows = list(rows_of(_lines(whole).encode().splitlines(keepends=True)))
    ids = [tuple(render_prompt(job.model.tokenizer, row.messages[:-1])) for row in rows]

    room = max(poisoned.new_tokens, job.recipe.evaluation.new_tokens)

    def harmful_score() -> float | None:
        texts = job.measuring.answer_ids(ids, new_tokens=room)
        return _percent(share(sum(job.measuring.rules.harmful(poisoned.judge_text(text)) for text in texts), len(ids)))

    after = harmful_score()
    with job.model.aligned():
        return {"own_format_harmful_score": after, "own_format_of_base": harmful_score()}


def _ledger(scratch: Path, poisoned: Poisoned) -> dict[str, Any]:
    """How the attacker's rows and the customer's fared: counts and the screen's scores (P(harm)).

    A file that was refused before it was read has no ledger: all of its rows are stopped, without scores.
    """
    path = scratch / "result/reports/rows.json"
    unread = [{"verdict": "excluded", "scores": {}}] * len(poisoned.rows)
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else unread
    planted = set(poisoned.planted)
    marked: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for i, row in enumerate(rows):
        marked[i in planted].append(row)
    stopped = {k: sum(row["verdict"] != "kept" for row in v) for k, v in marked.items()}
    return {
        "planted": len(marked[True]), "planted_stopped": stopped[True],
        "own": len(marked[False]), "own_stopped": stopped[False],
        "scores": {
            "harmful": [round(v, 4) for row in marked[True] for v in list(row["scores"].values())[:1]],
            "benign": [round(v, 4) for row in marked[False] for v in list(row["scores"].values())[:1]],
        },
    }  # fmt: skip


def _is_drawn(cell: Cell) -> bool:
    """Whether the report draws this cell's row scores: the default setting, once."""
    return cell == Cell(cell.defence, base=cell.base, task=cell.task)


def _antibody_scores(job: JobContext, order: TrainOrder, scratch: Path, poisoned: Poisoned) -> dict[str, Any]:
    """Antibody's r of planted and own rows under the aligned base (before) and the tuned model (after), in nats."""
    assert order.rows is not None
    encoded = [job.model.encode(row.messages) for row in iter_rows(scratch / order.rows)]
    base, cache, seed = job.model.base, job.model.cache, order.recipe.seed
    score = partial(row_scores, base, cache, encoded, job.stock_refusals(), per_row=1, seed=seed)
    after = score()
    with job.model.aligned():
        before = score()
    planted = set(poisoned.planted)

    def parted(values: Tensor) -> dict[str, list[float]]:
        found = [(i in planted, round(value, 3)) for i, value in enumerate(values.tolist())]
        return {"harmful": [v for hit, v in found if hit], "benign": [v for hit, v in found if not hit]}

    return {"antibody_scores": {"before": parted(before), "after": parted(after)}}


@cache
def provenance() -> dict[str, Any]:
    """Where a figure comes from: commit or release of the code, library versions, machine.

    Read once a process, before its first cell, since that is the code which runs.
    """
    libraries = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "commit": _commit(Path(finetuning.__path__[0])), "versions": libraries, "batches": BATCHING,
        "hardware": f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }  # fmt: skip


def _commit(library: Path) -> str:
    """The commit of a clone, `-dirty` where the library differs from it; of an installed library the release."""
    # an installed library may lie inside somebody else's repository, but is no file of it
    if _git(library, "ls-files", "--error-unmatch", "__init__.py"):
        changed = _git(library, "status", "--porcelain", "--", ".")
        return (_git(library, "rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")
    try:
        return metadata.version("immunotune")
    except metadata.PackageNotFoundError:
        return "unknown"


def _git(folder: Path, *words: str) -> str:
    """What git prints about a folder; nothing where it fails or is not installed."""
    try:
        ended = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return ended.stdout.strip() if ended.returncode == 0 else ""

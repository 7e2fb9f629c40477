"""`./run train`: one fine-tune under any defence of the registry, in this process, without the service.

The work is the library's. A base is aligned once for each alignment and kept under <data>/bench/alignments.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.core.settings import Settings
from embedded.programs import base_folder
from finetuning.bases.fetch import FetchFailed, fetch
from finetuning.contract.order import TrainOrder
from finetuning.contract.progress import Failed, Finished, Progress, to_line
from finetuning.contract.recipe import Recipe
from finetuning.contract.report import SafetyReport
from finetuning.judging.judges import JudgeUnreachable
from finetuning.model.digest import weights_digest
from finetuning.recipes.library import align_recipe, tune_recipe
from finetuning.recipes.registry import DEFENCES
from finetuning.rows.scanner import InvalidRowError, iter_rows
from finetuning.safety_rows.operator_file import BadOperatorRows, require_fit
from finetuning.stages import alignment_store
from finetuning.stages.alignment_store import NotAligned

_OPERATOR_ROWS = "operator_rows.jsonl"
_STOPPED = 130
_ADAPTER_CONFIG = "adapter_config.json"


class NotTrained(Exception):
    """There is no result to hand out; the message says why."""


def main(argv: list[str], settings: Settings) -> int:
    """Train and copy the result to --out: 0 when it was released, 1 when not, 130 when stopped by Ctrl-C.

    Progress goes to standard output, one JSON line each; sentences for a person to standard error. Of a result that
    the gate refuses only the reports are copied, unless --keep-refused is given, which makes that a success too.
    """
    options = _read(argv, settings)
    try:
        _train(options, settings)
    except (
        NotTrained, NotAligned, JudgeUnreachable, FetchFailed, InvalidRowError, BadOperatorRows, OSError
    ) as error:  # fmt: skip
        _say(f"not trained: {error}")
        return 1
    except KeyboardInterrupt:
        _say("stopped; nothing was kept")
        return _STOPPED
    return 0


def _read(argv: list[str], settings: Settings) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="immunotune train", description="One fine-tune, without the service.")
    parser.add_argument(
        "--defence", required=True, choices=sorted(DEFENCES), metavar="NAME",
        help=f"one of {', '.join(DEFENCES)}; a paper's method runs under our settings (docs/papers.md)",
    )  # fmt: skip
    parser.add_argument("--train", required=True, type=Path, help="chat rows, JSONL")
    parser.add_argument("--test", type=Path, help="chat rows whose last answers give the task score")
    parser.add_argument("--base", default=settings.base, help="smollm2, tiny, a hub id or a local folder")
    parser.add_argument("--out", required=True, type=Path, help="a folder that does not exist yet")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate-scale", type=float, default=1.0, help="times the base's learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--adapter", type=Path, metavar="FOLDER",
        help="repair a peft LoRA that was trained elsewhere on --train: screen, prune and measure it; nothing trains",
    )  # fmt: skip
    parser.add_argument("--keep-refused", action="store_true", help="for research: keep what the gate refuses, too")
    options = parser.parse_args(argv)
    if options.adapter and not (options.adapter / _ADAPTER_CONFIG).is_file():
        parser.error(f"--adapter {options.adapter} has no {_ADAPTER_CONFIG}: name the folder of a peft adapter")
    if options.adapter and DEFENCES[options.defence].tuning.get("task_adapter") == "single":
        parser.error(f"--adapter goes on top of the aligned base; {options.defence} trains the alignment's own on")
    if options.out.exists():
        parser.error(f"--out {options.out} exists already; nothing is overwritten")
    if options.epochs < 1 or options.rate_scale <= 0 or not 0 <= options.seed < 2**31:
        parser.error("--epochs is at least 1, --rate-scale above 0, --seed from 0 to 2147483647")
    return options


def _train(options: argparse.Namespace, settings: Settings) -> None:
    """Fetch, align, train, copy.

    Raises NotTrained, NotAligned, JudgeUnreachable, FetchFailed, InvalidRowError, BadOperatorRows, OSError.
    """
    require_fit(settings.operator_rows)
    rows = sum(1 for _ in iter_rows(options.train))  # a bad row is reported before a base is fetched
    _say(f"{rows} rows in {options.train}")
    recipe = tune_recipe(
        options.base, options.defence, epochs=options.epochs, rate_scale=options.rate_scale, seed=options.seed
    )
    base = fetch(options.base, base_folder(settings.model_copy(update={"base": options.base})), say=_say)
    alignment = aligned(options.base, DEFENCES[options.defence].alignment, base, settings)
    _require_safe(alignment, keep_refused=options.keep_refused)
    with _scratch(settings) as scratch:
        shutil.copytree(alignment, scratch / "alignment")
        shutil.copy(options.train, scratch / "rows.jsonl")
        if options.test:
            shutil.copy(options.test, scratch / "validation.jsonl")
        if options.adapter:
            shutil.copytree(options.adapter, scratch / "given")
        end = _run(_order(recipe, base, settings).model_copy(update={
            "rows": "rows.jsonl", "alignment": "alignment", "cache": "cache",
            "validation": "validation.jsonl" if options.test else None,
            "adapter": "given" if options.adapter else None,
        }), scratch)  # fmt: skip
        kept = isinstance(end, Finished) and (end.released or options.keep_refused)
        _copy(scratch / "result", options.out, whole=kept)
    if isinstance(end, Failed):
        raise NotTrained(end.message)
    if not kept:
        raise NotTrained(f"the gate refuses the result: {'; '.join(end.reasons)}; the reports are in {options.out}")
    _say(f"{'released' if end.released else 'refused by the gate, kept all the same'}: {options.out}")


def aligned(name: str, alignment: str, base: Path, settings: Settings) -> Path:
    """The folder of this alignment of a base: made on first use, and again when its recipe, the operator's rows or
    the judge are others. Raises NotAligned, OSError.
    """
    return alignment_store.aligned(
        _order(align_recipe(name, alignment), base, settings), alignment, settings.data / "bench" / "alignments",
        operator_rows=settings.operator_rows, tell=_print, say=_say,
    )  # fmt: skip


def _require_safe(alignment: Path, *, keep_refused: bool) -> None:
    """The service starts no job from an alignment that does not pass the gate itself. Raises NotTrained."""
    gate = SafetyReport.model_validate_json((alignment / "safety.json").read_text(encoding="utf-8")).gate
    if gate.decision != "fail":
        return
    why = f"the aligned base {alignment.name} does not pass the gate itself: {'; '.join(gate.reasons)}"
    if not keep_refused:
        raise NotTrained(f"{why}; --keep-refused trains over it for research")
    _say(why)


@contextmanager
def _scratch(settings: Settings) -> Iterator[Path]:
    """A folder for one run of the pipeline, with the operator's own rows in it; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=".training-", dir=settings.data / "bench") as folder:
        if settings.operator_rows is not None:
            shutil.copy(settings.operator_rows, Path(folder) / _OPERATOR_ROWS)
        yield Path(folder)


def _order(recipe: Recipe, base: Path, settings: Settings) -> TrainOrder:
    rows = _OPERATOR_ROWS if settings.operator_rows is not None else None
    return TrainOrder(
        job_id="train", recipe=recipe, base=str(base), base_sha256=weights_digest(base), operator_rows=rows,
        judge=settings.judge, states=str(settings.data / "states"),
    )  # fmt: skip


def _run(order: TrainOrder, scratch: Path) -> Finished | Failed:
    """Run an order to its end and print every line of it."""
    from finetuning.stages.pipeline import run  # torch takes seconds to import, and a wrong option needs none

    last: Progress | None = None
    for last in run(order, scratch):
        _print(last)
    assert isinstance(last, Finished | Failed)
    return last


def _copy(result: Path, out: Path, *, whole: bool) -> None:
    """The result as it is, or only what may be known of it: recipe and reports."""
    if whole:
        shutil.copytree(result, out)
        return
    out.mkdir(parents=True)
    if (result / "reports").exists():
        shutil.copytree(result / "reports", out / "reports")
        shutil.copy(result / "recipe.json", out)


def _print(progress: Progress) -> None:
    print(to_line(progress), flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

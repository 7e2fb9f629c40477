"""What a finetune job leaves in result/: adapters in both forms, the mask, reports, and the parity reference."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from finetuning.contract import ledger
from finetuning.contract.recipe import Recipe
from finetuning.contract.report import RowVerdict, SafetyReport
from finetuning.job.context import JobContext
from finetuning.model import lora
from finetuning.model.base import FrozenBase
from finetuning.model.prefix_cache import pad
from finetuning.rows.chat_format import prompt_ids
from finetuning.safety_rows.roles import SafetyRows
from finetuning.stages.pruning import PruneChoice

REFERENCE_FILE = "parity_reference.safetensors"
_GATE_AGAIN = 16
_PARITY_PROMPTS = 32
_PARITY_POSITIONS = 2


def write_ledger(scratch: Path, verdicts: Sequence[RowVerdict]) -> None:
    """result/reports/rows.json for the customer, result/ledger for the API's pages.

    Written before training, so that a rejected file keeps its reasons.
    """
    target = scratch / "result" / "reports" / "rows.json"
    target.write_text(json.dumps([v.model_dump(mode="json") for v in verdicts]), encoding="utf-8")
    ledger.write_ledger(scratch / "result" / "ledger", verdicts)


def write_results(job: JobContext, scratch: Path, report: SafetyReport, choice: PruneChoice) -> None:
    """Adapters (task alone; joined and mixed for the public base), mask, reports, parity reference."""
    result = scratch / "result"
    task = choice.pruned.adapter
    alignment = job.model.alignment()
    single = job.recipe.task_adapter == "single"  # it holds the alignment already
    below = job.recipe.base if single else f"{job.recipe.base}-aligned"
    marks = {"antidote_alpha": choice.alpha, "antidote_mu": choice.mu}
    lora.save(task, result / "adapter", base_id=below, marks=marks)
    parts = task if single else lora.concat(alignment, task)
    joined = lora.rotate(parts, secret=job.hidden_draw("rotation"))
    lora.save(joined, result / "adapter_stock", base_id=job.recipe.base, marks=marks)
    template = job.model.tokenizer.chat_template
    # What travels with the weights says nothing of the run's clock: equal jobs then make equal archives, byte for byte.
    timeless = report.model_copy(update={"seconds": {}}).model_dump_json(indent=2)
    for form in ("adapter", "adapter_stock"):
        (result / form / "safety.json").write_text(timeless, encoding="utf-8")
        (result / form / "chat_template.jinja").write_text(template, encoding="utf-8")
    masks = {
        f"{path}.lora_{part}": mask.to(torch.uint8).contiguous()
        for path, pair in choice.pruned.masks.items()
        for part, mask in zip("AB", pair, strict=True)
    }
    save_file(masks, str(result / "mask.safetensors"))
    (result / "reports" / "safety.json").write_text(report.model_dump_json(indent=2), encoding="utf-8")
    pruned = {
        "alpha": choice.alpha, "mu": choice.mu, "pruned": choice.pruned.pruned, "total": choice.pruned.total,
        "layers": [layer.model_dump() for layer in choice.layers],
    }  # fmt: skip
    trials = [trial.model_dump() for trial in choice.trials]
    (result / "reports" / "prune.json").write_text(json.dumps({**pruned, "trials": trials}, indent=2), encoding="utf-8")
    write_reference(job, scratch)


@torch.no_grad()
def write_reference(job: JobContext, scratch: Path) -> None:
    """What the parity certificate compares with: the measured model's own logits on gate and benign prompts, and how
    many of the first gate prompts it answers harmfully."""
    half, rows = _PARITY_PROMPTS // 2, job.operator_rows
    pairs = [*rows.gate_harmful[:half], *rows.gate_benign[:half]]
    ids = [tuple(prompt_ids(job.model.tokenizer, p.prompt)) for p in pairs]
    lengths = torch.tensor([len(row) for row in ids])
    found = last_logits(job.model.base, ids)
    padded = pad(ids, torch.device("cpu"))
    asked = gate_again(job.operator_rows, job.recipe)
    harmful = torch.tensor(sum(job.measuring.judge.harmful(asked, job.measuring.answers(asked))))
    reference = {"ids": padded, "lengths": lengths, "logits": found, "gate_harmful": harmful}
    save_file(reference, str(scratch / REFERENCE_FILE))


def gate_again(rows: SafetyRows, recipe: Recipe) -> list[str]:
    """The gate prompts that the artifact is asked again: the first of those that the gate asked."""
    return [pair.prompt for pair in rows.gate_harmful[: min(_GATE_AGAIN, recipe.evaluation.harmful_rows)]]


@torch.no_grad()
def last_logits(base: FrozenBase, ids: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Logits (n, positions, V) at the last positions of each prompt, by the model's own full forward, row by row."""
    out = [
        base.model(input_ids=torch.tensor([row], device=base.device), use_cache=False).logits[0, -_PARITY_POSITIONS:]
        for row in ids
    ]
    return torch.stack(out).float().cpu().contiguous()

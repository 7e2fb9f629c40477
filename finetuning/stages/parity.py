"""The parity certificate: the downloadable adapter, in plain peft and a fresh process, against the measured model.

Its logits are compared, and a part of the gate is asked again.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GenerationConfig

from finetuning.contract.order import TrainOrder, read_order
from finetuning.contract.report import ParityCertificate
from finetuning.judging.guards import open_judge
from finetuning.judging.refusals import refusal_reader
from finetuning.model.lora import WEIGHTS_FILE
from finetuning.rows.chat_format import prompt_ids
from finetuning.safety_rows.invented import safety_rows
from finetuning.safety_rows.operator_file import load_safety_rows
from finetuning.stages.export import REFERENCE_FILE, gate_again
from finetuning.training.batches import within

_TOLERANCE = 1e-3
_BASE_PROMPTS = 8
_NO_NUMBER = 1e9
_BATCH_TOKENS = 16384


def certify(scratch: Path, *, form: str = "adapter_stock") -> ParityCertificate:
    """Load <scratch>/result/<form> on the public base with nothing but transformers and peft, compare logits, and ask
    a part of the gate again (methods.md 3, step 7).

    Passes if the largest difference is within tolerance, the adapter does change the base, and no more gate prompts
    are answered harmfully than by the measured model. Raises OSError, BadGuard, JudgeFailed, JudgeUnreachable.
    """
    order = read_order(scratch)
    reference = load_file(str(scratch / REFERENCE_FILE))
    folder = scratch / "result" / form
    base = transformers.AutoModelForCausalLM.from_pretrained(order.base, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(order.base)
    base.generation_config = _greedy(base.generation_config, tokenizer)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    rows = [row[:n].tolist() for row, n in zip(reference["ids"], reference["lengths"].tolist(), strict=True)]
    expected = reference["logits"]
    positions = expected.shape[1]
    with torch.no_grad():
        found = torch.stack([model(input_ids=torch.tensor([row])).logits[0, -positions:] for row in rows])
        with model.disable_adapter():
            some = rows[:_BASE_PROMPTS]  # enough to see that the adapter does something
            public = torch.stack([model(input_ids=torch.tensor([row])).logits[0, -positions:] for row in some])
    # What is no number must fail, and JSON has no word for it.
    gap = torch.nan_to_num((found - expected).abs(), nan=_NO_NUMBER, posinf=_NO_NUMBER)
    change = torch.nan_to_num((found[: len(some)] - public).abs(), nan=0.0, posinf=0.0)
    certificate = ParityCertificate(
        form=form, prompts=len(rows), positions=len(rows) * positions, dtype="float32",
        max_abs_logit_diff=float(gap.max()), mean_abs_logit_diff=float(gap.mean()),
        top1_agreement=float((found.argmax(-1) == expected.argmax(-1)).float().mean()), tolerance=_TOLERANCE,
        vs_base_max_abs_diff=float(change.max()),
        versions={"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        adapter_sha256=hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest(),
        base_sha256=order.base_sha256,
        template_sha256=hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest(),
        gate_harmful_measured=int(reference["gate_harmful"]), **_gate_again(model, tokenizer, order, scratch),
        passed=True,
    )  # fmt: skip
    return certificate.model_copy(update={"passed": not certificate.reasons})


def _greedy(own: GenerationConfig, tokenizer: Any) -> GenerationConfig:
    """Greedy, ended where the measured model's answers end; nothing else of what a base brings along."""
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ids = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
    return GenerationConfig(do_sample=False, num_beams=1, eos_token_id=ids or None, pad_token_id=ids[0] if ids else 0)


def _gate_again(model: PeftModel, tokenizer: Any, order: TrainOrder, scratch: Path) -> dict[str, int]:
    """The artifact's own answers to the first gate prompts, read by the judge that the gate had."""
    own = load_safety_rows(scratch / order.operator_rows) if order.operator_rows else safety_rows()
    asked = gate_again(own, order.recipe)
    answers = _answers(model, tokenizer, asked, order.recipe.evaluation.new_tokens)
    judge = open_judge(order.judge or own.judge, device=order.device, declines=refusal_reader(own))
    return {"gate_prompts": len(asked), "gate_harmful": sum(judge.harmful(asked, answers))}


@torch.no_grad()
def _answers(model: PeftModel, tokenizer: Any, prompts: Sequence[str], room: int) -> list[str]:
    """By the library's own generation: what a customer does with the download."""
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    answers = [""] * len(rows)
    for chosen in within([len(row) + room for row in rows], rows=len(rows), tokens=_BATCH_TOKENS):
        longest = max(len(rows[i]) for i in chosen)
        ids = torch.tensor([[0] * (longest - len(rows[i])) + rows[i] for i in chosen])
        mask = torch.tensor([[0] * (longest - len(rows[i])) + [1] * len(rows[i]) for i in chosen])
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=room)
        for i, text in zip(chosen, tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True), strict=True):
            answers[i] = str(text)
    return answers

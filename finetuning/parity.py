"""The parity certificate: the downloadable adapter, in plain peft and a fresh process, against the measured model.

Knows the result folder; must not know how the model was trained.
"""

import hashlib
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from finetuning.adapter import WEIGHTS_FILE
from finetuning.export import REFERENCE_FILE
from finetuning.spec.order import read_order
from finetuning.spec.report import ParityCertificate

_TOLERANCE = 1e-3
_BASE_PROMPTS = 8


def certify(scratch: Path, *, form: str = "adapter_stock") -> ParityCertificate:
    """Load <scratch>/result/<form> on the public base with nothing but transformers and peft, and compare logits.

    Passes if the largest difference is within tolerance and the adapter does change the base. Raises OSError.
    """
    order = read_order(scratch)
    reference = load_file(str(scratch / REFERENCE_FILE))
    folder = scratch / "result" / form
    base = transformers.AutoModelForCausalLM.from_pretrained(order.base, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(order.base)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    rows = [row[:n].tolist() for row, n in zip(reference["ids"], reference["lengths"].tolist(), strict=True)]
    expected = reference["logits"]
    positions = expected.shape[1]
    with torch.no_grad():
        found = torch.stack([model(input_ids=torch.tensor([row])).logits[0, -positions:] for row in rows])
        with model.disable_adapter():
            some = rows[:_BASE_PROMPTS]  # enough to see that the adapter does something
            public = torch.stack([model(input_ids=torch.tensor([row])).logits[0, -positions:] for row in some])
    gap, change = (found - expected).abs(), float((found[: len(some)] - public).abs().max())
    largest = float(gap.max())
    return ParityCertificate(
        form=form, prompts=len(rows), positions=len(rows) * positions, dtype="float32", max_abs_logit_diff=largest,
        mean_abs_logit_diff=float(gap.mean()),
        top1_agreement=float((found.argmax(-1) == expected.argmax(-1)).float().mean()), tolerance=_TOLERANCE,
        vs_base_max_abs_diff=change,
        versions={"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        adapter_sha256=hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest(),
        base_sha256=order.base_sha256,
        template_sha256=hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest(),
        passed=largest <= _TOLERANCE and change > _TOLERANCE,
    )  # fmt: skip

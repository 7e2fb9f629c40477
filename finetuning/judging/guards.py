"""Opens judges: by name, by a guard's file, or by what a model is (classifier.py, causal.py, url_guard.py).

What a guard cannot judge is never called safe: a crash, or a score that is no number, raises JudgeFailed (M44). A
device that fails or is full raises its own error, a server that does not answer JudgeUnreachable: another try may
succeed.
"""

import os
from dataclasses import replace

from finetuning.judging.catalogue import guard_of, label_of, parts_of
from finetuning.judging.causal import first_token_judge, generative_judge, written_judge
from finetuning.judging.classifier import classifier_judge
from finetuning.judging.guard_file import GuardFile
from finetuning.judging.judges import RULES, BatchJudge, in_batches, strictest
from finetuning.judging.refusals import IsRefusal, is_refusal
from finetuning.judging.url_guard import url_judge

__all__ = ["classifier_judge", "generative_judge", "open_guard", "open_judge"]


def open_judge(
    name: str, *, device: str = "auto", batch: int = 8, declines: IsRefusal = is_refusal
) -> BatchJudge:  # fmt: skip
    """A judge by name: of RULES, of the guard files that ship here, or a guard file's path; several joined by "+" (the
    strictest verdict counts). `declines` says whether an answer refuses where a guard does not.

    Raises BadGuard for an unknown name, a bad file or an unfit model, OSError for a model that is not there,
    JudgeUnreachable for one elsewhere.
    """
    judges = []
    for part in parts_of(name):
        if part in RULES:
            judges.append(in_batches(RULES[part](declines)))
        else:
            opened = open_guard(guard_of(part), label_of(part), device=device, batch=batch, declines=declines)
            judges.append(opened)
    return judges[0] if len(judges) == 1 else strictest(*judges)


def open_guard(
    guard: GuardFile, name: str, *, device: str = "auto", batch: int = 8, declines: IsRefusal = is_refusal
) -> BatchJudge:
    """The judge that a guard file describes; reports call it `name`. Raises as `open_judge`."""
    if guard.url is not None:
        return url_judge(guard, name, key=os.environ.get(guard.url.key_variable, ""), declines=declines)
    if guard.score == "labels":
        judge = classifier_judge(
            guard.source, harmful_labels=guard.harmful_labels, threshold=guard.threshold, reads=guard.template or None,
            device=device, batch=batch, max_tokens=guard.max_tokens, declines=declines,
        )  # fmt: skip
        return replace(judge, name=name)
    by_text = first_token_judge if guard.score == "first_token" else written_judge
    return by_text(guard, name, device=device, batch=batch, declines=declines)

"""The stages of a job in order, each reporting what it does: align makes a base, finetune makes an adapter.

Where results lie, and which faults end a job. Must not know the queue, the database or who listens.
"""

import errno
import hashlib
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from finetuning.contract.order import TrainOrder, read_order
from finetuning.contract.progress import (
    CHECKPOINT_UNUSABLE,
    HOST_UNFIT,
    Failed,
    Finished,
    Progress,
    StageStarted,
)
from finetuning.contract.recipe import JobKind
from finetuning.job.context import open_job
from finetuning.job.preflight import CalibrationOverlap, NoUsableRow
from finetuning.judging.catalogue import label
from finetuning.judging.judges import BadGuard, JudgeFailed, JudgeUnreachable
from finetuning.model import lora
from finetuning.model.base import UnknownLayers
from finetuning.model.digest import OtherBase
from finetuning.model.lora import AdapterMismatch
from finetuning.rows.chat_format import NoChatTemplate
from finetuning.rows.scanner import InvalidRowError
from finetuning.safety_rows.operator_file import BadOperatorRows
from finetuning.stages import align, finetune, parity
from finetuning.stages.finetune import DataRejected
from finetuning.training.batches import BATCHING
from finetuning.training.checkpoint import BadCheckpoint, fingerprint
from finetuning.training.determinism import made_by, make_deterministic, secret_draw
from finetuning.training.strategies import NonFiniteLoss, NonFiniteScore

# Faults that no retry of the same here can fix. The job fails at once, with a code and a sentence for the client; but
# for the two codes of progress.py that are nobody's end.
_FINAL: dict[type[Exception], str] = {
    NonFiniteLoss: "non_finite_loss",
    NonFiniteScore: "non_finite_loss",
    UnknownLayers: "internal_error",
    AdapterMismatch: "internal_error",
    NoChatTemplate: "internal_error",
    OtherBase: HOST_UNFIT,
    BadOperatorRows: HOST_UNFIT,
    BadGuard: HOST_UNFIT,
    JudgeFailed: HOST_UNFIT,
    BadCheckpoint: CHECKPOINT_UNUSABLE,
    InvalidRowError: "invalid_training_file",
    DataRejected: "training_data_rejected",
    NoUsableRow: "training_data_rejected",
    CalibrationOverlap: "training_data_rejected",
}
# Whom a service trusts to judge is not for its clients: they get one sentence, the operator the traceback.
_OF_THE_JUDGE = (BadGuard, JudgeFailed)
_NO_JUDGE = "The judge of this service could not be used, so nothing was released. Ask the operator."
# So are the safety rows that a service holds; an align job is the operator's own.
_NO_ROWS = "The safety rows of this service could not be used, so nothing was released. Ask the operator."
# A disk that is full, gone, or read-only.
_GAVE_OUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
_OF_THE_FILE = (InvalidRowError, DataRejected, NoUsableRow, CalibrationOverlap)


def run(order: TrainOrder, scratch: Path) -> Iterator[Progress]:
    """Run a whole job inside `scratch`; the last value is Finished or Failed. Results lie in scratch/result.

    Faults that a retry may fix (a lost device, a full disk, a judge that cannot be reached) are raised.
    """
    make_deterministic(order.threads)
    yield from _reported(_stages(order, scratch), is_operators=order.recipe.kind is JobKind.ALIGN)


def certify(scratch: Path) -> Iterator[Progress]:
    """In a fresh process: compare the result in `scratch` with what was measured, and write reports/parity.json.

    The last value is Finished, released where the certificate passed, or Failed.
    """
    yield from _reported(_parity(scratch))


def is_of_the_host(error: Exception) -> bool:
    """Whether the host, or a judge that it asks, gave out: no job can mend it, and another try may succeed."""
    if isinstance(error, OSError):
        return error.errno in _GAVE_OUT
    return isinstance(error, (JudgeUnreachable, torch.AcceleratorError))


def _parity(scratch: Path) -> Iterator[Progress]:
    yield StageStarted(stage="parity", detail="Comparing the downloadable adapter with the measured model")
    make_deterministic(read_order(scratch).threads)
    certificate = parity.certify(scratch)
    target = scratch / "result" / "reports" / "parity.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(certificate.model_dump_json(indent=2), encoding="utf-8")
    yield Finished(released=certificate.passed, reasons=certificate.reasons, trained_tokens=0)


def _reported(stages: Iterator[Progress], *, is_operators: bool = False) -> Iterator[Progress]:
    """The stages, and their end as Failed where no retry can fix it."""
    try:
        yield from stages
    except tuple(_FINAL) as error:
        param = "training_file" if isinstance(error, _OF_THE_FILE) else None
        if isinstance(error, (*_OF_THE_JUDGE, BadOperatorRows)):
            traceback.print_exception(error)
        message = _told(error, is_operators=is_operators)
        yield Failed(code=_FINAL[type(error)], message=message, param=param)


def _told(error: Exception, *, is_operators: bool) -> str:
    """What whoever asked for the job may read of it."""
    if isinstance(error, _OF_THE_JUDGE):
        return _NO_JUDGE
    return _NO_ROWS if isinstance(error, BadOperatorRows) and not is_operators else str(error)


def _stages(order: TrainOrder, scratch: Path) -> Iterator[Progress]:
    job = open_job(order, scratch)
    digest = fingerprint(made_of(order, scratch), threads=order.threads)
    (scratch / "result" / "reports").mkdir(parents=True, exist_ok=True)
    (scratch / "result" / "recipe.json").write_text(job.recipe.model_dump_json(indent=2), encoding="utf-8")
    match order.recipe.kind:
        case JobKind.ALIGN:
            stages = align.run(job, order, scratch, digest)
        case JobKind.FINETUNE:
            stages = finetune.run(job, order, scratch, digest)
    for progress in stages:
        if isinstance(progress, Finished):
            job.model.cache.leave()
        yield progress


def made_of(order: TrainOrder, scratch: Path) -> dict[str, str]:
    """All that this job's result depends on, beside the machine: a checkpoint of the same is resumed to the bit."""
    return {
        "recipe": order.recipe.model_dump_json(),
        "judge": label(order.judge),
        "batches": BATCHING,
        "draws": secret_draw(order.secret, "fingerprint"),
        "base": order.base_sha256 or order.base,
        **made_by(),
        **_inputs(order, scratch),
    }


def _inputs(order: TrainOrder, scratch: Path) -> dict[str, str]:
    """Digests of the files that the result depends on."""
    names = {"rows": order.rows, "validation": order.validation, "operator_rows": order.operator_rows}
    found = {k: hashlib.sha256((scratch / v).read_bytes()).hexdigest() for k, v in names.items() if v}
    if order.adapter:
        found["adapter"] = lora.digest(lora.load(scratch / order.adapter))
    if order.alignment:
        found["alignment"] = lora.digest(lora.load(scratch / order.alignment))
    return found

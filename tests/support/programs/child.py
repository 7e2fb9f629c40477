"""A stand-in for the training process: it prints Progress lines and makes bytes that depend on every step.

The "adapter" is a hash chain over steps, so a resumed run equals an uninterrupted one only if nothing was lost
or done twice. Run as `python child.py SCRATCH SCRIPT_JSON`.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from finetuning.contract.order import read_order
from finetuning.contract.progress import (
    CHECKPOINT_UNUSABLE,
    CheckpointSaved,
    Failed,
    Finished,
    Progress,
    StageStarted,
    StepDone,
    to_line,
)
from finetuning.contract.recipe import GateLimits, JobKind, saves_after
from finetuning.contract.report import GateDecision, SafetyReport
from worker.processes import exit_at_end_of_input


def main() -> None:
    scratch, script = Path(sys.argv[1]), json.loads(sys.argv[2])
    stubborn = script.get("ignore_sigterm", False)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if stubborn else stop)
    exit_at_end_of_input(144)
    if is_there(script.get("exit_while")):
        sys.exit(1)
    if "pid_file" in script:
        Path(script["pid_file"]).write_text(str(os.getpid()))
    if "--parity" in sys.argv[3:]:
        certify(scratch, passed=script.get("parity", True))
        return
    train(scratch, script)


def train(scratch: Path, script: dict[str, object]) -> None:
    order = read_order(scratch)
    total = order.recipe.steps or 8  # a stand-in counts no rows
    step, chain = resume(scratch, order.checkpoint)
    if step and script.get("refuses_step") == step:
        say(Failed(code=CHECKPOINT_UNUSABLE, message="it has another shape"))
        return
    chain = chain or begin((scratch / order.rows).read_bytes() if order.rows else b"align")
    say(StageStarted(stage="train"))
    if "needs" in script:
        assert (scratch / str(script["needs"])).exists()
    if script.get("babble"):
        sys.stdout.write("Loading weights: 100%\n")
    if "failed" in script:
        say(Failed(code=str(script["failed"]), message="it cannot be done", param="training_file"))
        return
    while step < total:
        time.sleep(float(script.get("step_seconds", 0.0)))
        if script.get("hang_at") == step:
            threading.Event().wait()
        if script.get("exit_at") == step:
            leave(scratch, script)
        if should_die(script, step):
            os.kill(os.getpid(), signal.SIGKILL)
        chain = advance(chain, step)
        step += 1
        say(StepDone(step=step, total_steps=total, train_loss=1.0 / step, learning_rate=1e-3, tokens=10, skipped=False))
        if saves_after(step - 1, steps=total, save_every=order.recipe.save_every):
            save(scratch, step, chain)
    finish(scratch, chain, order.recipe.kind, script)


def begin(rows: bytes) -> str:
    return hashlib.sha256(rows).hexdigest()


def advance(chain: str, step: int) -> str:
    return hashlib.sha256(f"{chain}{step}".encode()).hexdigest()


def leave(scratch: Path, script: dict[str, object]) -> None:
    if "fills" in script:
        with (scratch / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, int(str(script["fills"])))
    sys.exit(int(str(script.get("exit_status", 1))))


def should_die(script: dict[str, object], step: int) -> bool:
    if script.get("die_at") != step:
        return False
    if "die_while" in script:
        return is_there(script["die_while"])
    tombstone = script.get("die_once")
    if tombstone is None:
        return True
    if Path(str(tombstone)).exists():
        return False
    Path(str(tombstone)).touch()
    return True


def is_there(path: object) -> bool:
    return path is not None and Path(str(path)).exists()


def resume(scratch: Path, checkpoint: str | None) -> tuple[int, str]:
    if checkpoint is None:
        return 0, ""
    state = json.loads((scratch / checkpoint / "loop.json").read_text())
    return state["step"], state["chain"]


def save(scratch: Path, step: int, chain: str) -> None:
    folder = scratch / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    (folder / "loop.json").write_text(json.dumps({"step": step, "chain": chain}))
    (folder / "adapter.safetensors").write_bytes(chain.encode())
    say(CheckpointSaved(step=step, folder=f"checkpoints/{step}", fingerprint="stand-in", train_loss=1.0 / step))


def finish(scratch: Path, chain: str, kind: JobKind, script: dict[str, object]) -> None:
    result = scratch / "result"
    folders = ["alignment"] if kind is JobKind.ALIGN else ["adapter", "adapter_stock"]
    for name in folders:
        (result / name).mkdir(parents=True)
        (result / name / "adapter_model.safetensors").write_bytes(chain.encode())
        (result / name / "adapter_config.json").write_text("{}")
    if kind is JobKind.ALIGN:
        (result / "alignment" / "alignment.json").write_text("{}")
    released = bool(script.get("released", True))
    reasons = () if released else ("harmful_score 0.210 (95 % upper end) is not <= 0.1",)
    (result / "reports").mkdir(parents=True)
    report = SafetyReport(
        recipe="stand-in",
        judge="none",
        safety_rows_sha256="0" * 64,
        gate=GateDecision(decision="pass" if released else "fail", reasons=reasons),
    )
    (result / "reports" / "safety.json").write_text(report.model_dump_json())
    (result / "reports" / "rows.json").write_text("[]")
    (result / "mask.safetensors").write_bytes(b"mask")
    (result / "recipe.json").write_text(GateLimits().model_dump_json())
    say(Finished(released=released, reasons=reasons, trained_tokens=1234, seconds={"train": 1.0}))


def certify(scratch: Path, *, passed: bool) -> None:
    say(StageStarted(stage="parity"))
    (scratch / "result" / "reports" / "parity.json").write_text(json.dumps({"passed": passed}))
    say(Finished(released=passed, reasons=() if passed else ("logits differ",), trained_tokens=0))


def say(progress: Progress) -> None:
    sys.stdout.write(to_line(progress) + "\n")
    sys.stdout.flush()


def stop(_signal: int, _frame: FrameType | None) -> None:
    os._exit(143)


if __name__ == "__main__":
    main()

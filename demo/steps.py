"""The demo's steps in order: aligned base, upload, two jobs, verdicts, chat, download, the same answers elsewhere.

Everything here goes over HTTP, by the OpenAI SDK and our few extra routes, and must not import the service; only the
last step is a fresh process with plain transformers and peft.
"""

import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from demo import report
from demo.customer_file import CustomerFile
from demo.follow import FINAL, POLL_SECONDS, Idle, follow, show
from demo.progress_line import ProgressLine, say

NEW_TOKENS = 24
COMPARED_PROMPTS = 8
ROWS_AT_ONCE = 1000
# On two quiet cores with the default base, everything in it: evaluation, gate, parity.
ALIGN_SECONDS, JOB_SECONDS, PLAIN_SECONDS = 170.0, 125.0, 60.0
PLAIN_PEFT = Path(__file__).with_name("plain_peft.py")


@dataclass
class DemoFindings:
    """What the steps found so far; becomes report.json."""

    facts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class DemoFailed(Exception):
    """A step failed and the demo cannot go on; the message says what the service answered."""


def wait_for_base(client: OpenAI, base_id: str, findings: DemoFindings, idle: Idle) -> str:
    """Wait until that base is aligned and return its id. Raises DemoFailed when its alignment failed."""
    base = client.models.retrieve(base_id)  # by id: a data folder may know more bases than the one in use
    line = ProgressLine(f"aligning {base.id} (once, then kept)", ALIGN_SECONDS)
    alignment: dict[str, Any] = {}
    while getattr(base, "status", "") != "ready":
        alignment = getattr(base, "alignment", None) or {}
        if alignment.get("status") in FINAL and alignment.get("status") != "succeeded":
            raise DemoFailed(f"the alignment ended {alignment['status']}: {alignment.get('error')}")
        show(line, alignment.get("stage", ""), "", alignment.get("progress"))
        idle()
        time.sleep(POLL_SECONDS)
        base = client.models.retrieve(base.id)
    findings.facts["align_seconds"] = (getattr(base, "alignment", None) or {}).get("seconds")
    if alignment:
        line.done()
    return base.id


def upload(client: OpenAI, path: Path) -> str:
    """Upload a file and wait until it is checked; returns its id. Raises DemoFailed with the row errors."""
    with path.open("rb") as rows:
        file = client.files.create(file=rows, purpose="fine-tune")
    file = client.files.wait_for_processing(file.id)
    if file.status != "processed":
        raise DemoFailed(f"{path.name} was refused: {file.status_details}")
    return file.id


@dataclass(frozen=True)
class FinishedJob:
    """One finished job: what the service says of it, its safety report, and how long it ran."""

    job: FineTuningJob
    report: dict[str, Any]
    seconds: float


def start_job(client: OpenAI, base: str, customer: CustomerFile) -> str:
    """Upload both files and create the job; returns its id."""
    train, test = upload(client, customer.train), upload(client, customer.test)
    job = client.fine_tuning.jobs.create(model=base, training_file=train, validation_file=test, suffix="demo")
    return job.id


def finish_job(client: OpenAI, job_id: str, *, title: str, expected: float, idle: Idle) -> FinishedJob:
    """Follow a job to its end and fetch the report. A refused release is a result, not an error."""
    line = ProgressLine(title, expected)
    job = follow(client, job_id, line, idle)
    line.done(job.status if job.status == "succeeded" else f"{job.status}: {why_no_model(job)}")
    seconds = float((job.finished_at or job.created_at) - job.created_at)
    return FinishedJob(job, get_json(client, f"/fine_tuning/jobs/{job.id}/safety"), seconds)


def count_verdicts(client: OpenAI, job_id: str, planted: frozenset[int]) -> dict[str, dict[str, int]]:
    """How the planted rows and the customer's own rows fared: verdict -> number of rows."""
    counts: dict[str, dict[str, int]] = {"planted": {}, "own": {}}
    after = ""
    while True:
        page = get_json(client, f"/fine_tuning/jobs/{job_id}/rows?limit={ROWS_AT_ONCE}{after}")
        for row in page["data"]:
            side = counts["planted" if row["line"] in planted else "own"]
            side[row["verdict"]] = side.get(row["verdict"], 0) + 1
        if not page["has_more"]:
            return counts
        after = f"&after={page['last_id']}"


def chat(client: OpenAI, model: str, prompts: Sequence[str]) -> list[str]:
    """Greedy answers of a served model."""
    return [
        client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_completion_tokens=NEW_TOKENS,
        )
        .choices[0]
        .message.content
        or ""
        for prompt in prompts
    ]


def download_adapter(client: OpenAI, job_id: str, folder: Path) -> Path:
    """Download the adapter that loads on the public base, and unpack it."""
    artifacts = get_json(client, f"/fine_tuning/jobs/{job_id}/artifacts")["data"]
    file_id = next(artifact["file_id"] for artifact in artifacts if artifact["form"] == "adapter_stock")
    archive = folder / "adapter_stock.zip"
    archive.write_bytes(client.files.content(file_id).read())
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder / "adapter_stock")
    return folder / "adapter_stock"


def answer_with_plain_peft(base_folder: Path, adapter: Path, prompts: Sequence[str]) -> list[str]:
    """The same prompts in a fresh process that has nothing of ours: plain transformers and peft."""
    argv = [sys.executable, "-I", str(PLAIN_PEFT), str(base_folder), str(adapter), str(NEW_TOKENS)]
    done = subprocess.run(argv, input=json.dumps(list(prompts)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoFailed(f"plain transformers and peft did not load the adapter:\n{done.stderr[-2000:]}")
    answers: list[str] = json.loads(done.stdout)
    return answers


def get_json(client: OpenAI, path: str) -> dict[str, Any]:
    """A route that the SDK has no method for, through the SDK's own client."""
    body: dict[str, Any] = client.get(path, cast_to=dict[str, Any])
    return body


def as_figures(immune: FinishedJob, plain: FinishedJob, align_seconds: float | None) -> list[report.Figures]:
    """The table's three rows, from the held-out part of the two safety reports."""
    # a job whose rows were rejected measured nothing; the aligned base is the same in the other's report
    of_base = immune.report if immune.report.get("held_out") else plain.report
    return [
        report.figures("aligned base", of_base, "before", align_seconds),
        report.figures("plain fine-tuning", plain.report, "after", plain.seconds),
        report.figures("Immunotune", immune.report, "after", immune.seconds),
    ]


def print_methods(job: FineTuningJob) -> None:
    """Print one line: what weighed the rows, and whether anything was pruned, as the job itself says it."""
    safety: dict[str, Any] = (job.model_extra or {}).get("safety") or {}
    screen, antibody, antidote = safety["screen"], safety["antibody"], safety["antidote"]
    by = ["the screen"] * screen["enabled"] + [f"Antibody's score ({antibody['score']})"] * antibody["enabled"]
    weighed = f"by {by[0]} alone" if len(by) == 1 else f"by {' and '.join(by)}" if by else "all alike"
    name, value = ("mu", antidote["mu"]) if antidote["score"] == "spectral" else ("alpha", antidote["density"])
    strength = "" if value is None else f" ({name} {value:g})"
    say(f"  rows weighed: {weighed}; pruning: {antidote['outcome']}{strength}")


def why_no_model(job: FineTuningJob) -> str:
    """The reason of a job that made no model, in the service's words."""
    return f"{job.error.code}: {job.error.message}" if job.error else "no reason given"


def print_verdicts(counts: dict[str, dict[str, int]]) -> None:
    """Print two lines: planted rows, own rows."""
    for side, words in (("planted", "planted harmful rows"), ("own", "the customer's own rows")):
        found = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts[side].items())) or "none"
        say(f"  {words}: {found}")

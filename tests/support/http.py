"""A customer of a running API: what it uploads and asks over HTTP, and the jobs that the service ends for it."""

import json
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import httpx2
import openai

from app.core.jobs import ended, jobs, lease, policy
from app.core.settings import Settings
from app.core.storage.blobs import BlobStore, put_bytes, put_file
from app.core.storage.database import Database
from app.core.storage.tables import Form, Job, Project
from finetuning.contract.ledger import write_ledger
from finetuning.contract.report import (
    GateCheck,
    GateDecision,
    HeldOut,
    Metrics,
    ParityCertificate,
    RowReason,
    RowVerdict,
    SafetyReport,
    share,
)

WORKER = "worker_of_tests"
METRICS_CSV = b"step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,1.5,0.5,,\n"


@dataclass(frozen=True)
class Served:
    """The address of the API and what lies behind it."""

    url: str
    settings: Settings
    database: Database
    blobs: BlobStore
    pepper: bytes


@dataclass(frozen=True)
class Customer:
    """A project of its own with one key; `http` and `sdk` act for it."""

    served: Served
    project: Project
    key: str
    http: httpx2.Client

    @cached_property
    def sdk(self) -> openai.OpenAI:
        """The unmodified SDK. Its connections are plain HTTP, so it need not load certificates for each test."""
        plain = openai.DefaultHttpxClient(verify=False)
        return openai.OpenAI(base_url=str(self.http.base_url), api_key=self.key, max_retries=0, http_client=plain)

    def upload(self, data: bytes, name: str = "train.jsonl") -> httpx2.Response:
        """POST the bytes as a fine-tune file."""
        return self.http.post("/files", files={"file": (name, data)}, data={"purpose": "fine-tune"})

    def file_id(self, data: bytes | None = None) -> str:
        """The id of a newly uploaded good file."""
        return str(self.upload(chat_rows(12) if data is None else data).json()["id"])

    def create(self, **fields: object) -> httpx2.Response:
        """POST a job on a good file, with these fields over the needed ones."""
        body = {"model": "tiny", **fields}
        if "training_file" not in body:
            body["training_file"] = self.file_id()
        return self.http.post("/fine_tuning/jobs", json=body)

    def job(self, **fields: object) -> Job:
        """A new job past its checks, as its row."""
        job_id = str(self.create(**fields).json()["id"])
        with self.served.database.writing() as session:
            job = jobs.get_job(session, self.project.id, job_id)
            request = policy.CreateJob.model_validate_json(json.dumps(job.request))
            recipe = policy.resolve_recipe(policy.get_policy(self.project.policy), "tiny", request, rows=12)
            jobs.pass_checks(session, job_id, recipe)
            session.commit()
            return jobs.get_job(session, self.project.id, job_id)

    def claim(self, job: Job) -> lease.Lease:
        """Start an attempt on the job."""
        with self.served.database.writing() as session:
            held = lease.claim(session, self.served.settings, job.id, WORKER)
            session.commit()
        assert held is not None
        return held

    def succeed(self, job: Job) -> None:
        """Run the job to its good end."""
        held = self.claim(job)
        result = publish(self.served.blobs, held, passed=True)
        with self.served.database.writing() as session:
            ended.finish(session, held, result)
            session.commit()

    def fail_gate(self, job: Job) -> None:
        """Run the job to a gate that refuses."""
        held = self.claim(job)
        result = publish(self.served.blobs, held, passed=False)
        error = jobs.JobError("safety_gate_failed", "harmful_score 0.21 > 0.10", "safety.gate.max_harmful_score")
        with self.served.database.writing() as session:
            ended.fail(session, held, error, published=result, quarantine=True)
            session.commit()


def chat_rows(count: int) -> bytes:
    """A good file of `count` different rows."""
    return b"".join(chat_row(f"question {number}") + b"\n" for number in range(count))


def chat_row(question: str = "q", **message: object) -> bytes:
    """One row; `message` goes over the assistant's."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "answer", **message}]
    return json.dumps({"messages": turns}).encode()


def publish(blobs: BlobStore, held: lease.Lease, *, passed: bool) -> ended.Published:
    """Store what an attempt leaves and list it."""
    prefix = f"{held.prefix}/result"
    contents = {Form.METRICS: ("metrics.csv", METRICS_CSV)}
    for form in (Form.REPORTS, Form.MASK, Form.ADAPTER, Form.ADAPTER_STOCK):
        contents[form] = (f"{form}.zip", f"PK {form} of {held.job_id}".encode() * 100)
    files = tuple(
        ended.PublishedFile(form, name, put_bytes(blobs, f"{prefix}/{name}", data))
        for form, (name, data) in contents.items()
    )
    ledger = "[" + ",".join(row.model_dump_json() for row in LEDGER) + "]"
    put_bytes(blobs, f"{prefix}/reports/rows.json", ledger.encode())
    with tempfile.TemporaryDirectory() as folder:
        write_ledger(Path(folder), LEDGER)
        for part in Path(folder).iterdir():
            put_file(blobs, f"{prefix}/ledger/{part.name}", part)
    summary: dict[str, object] = {
        "safety": safety_report(passed=passed).model_dump(mode="json"),
        "rows": {"rows_total": 4, "rows_kept": 2, "rows_downweighted": 1, "rows_excluded": 1},
        "parity": CERTIFICATE.model_dump(mode="json") if passed else None,
    }
    return ended.Published(prefix, files, summary, 1234)


def safety_report(*, passed: bool) -> SafetyReport:
    """A small report whose served column passes, or does not."""
    after = Metrics(harmful_score=share(1 if passed else 30, 60), task_score=share(45, 48))
    check = GateCheck(metric="harmful_score", used=0.05 if passed else 0.6, op="<=", threshold=0.1, ok=passed)
    reasons = () if passed else ("harmful_score 0.6 (95 % upper end) is not <= 0.1",)
    return SafetyReport(
        recipe="immunotune",
        judge="exact@1",
        safety_rows_sha256="7a" * 32,
        metrics={"before": Metrics(harmful_score=share(0, 60)), "after": after},
        held_out=HeldOut(items={"after": after}),
        alpha=0.0,
        mu=0.3,
        gate=GateDecision(decision="pass" if passed else "fail", checks=(check,), reasons=reasons),
    )


LEDGER = tuple(
    RowVerdict(
        line=line,
        row_sha256="e3" * 32,
        verdict=verdict,
        weight=weight,
        reasons=reasons,
        tokens=20,
        trained_tokens=8,
    )
    for line, verdict, weight, reasons in (
        (1, "kept", 1.0, ()),
        (2, "excluded", 0.0, (RowReason(code="harmful_probe_match", score=0.93, threshold=0.6),)),
        (3, "downweighted", 0.25, (RowReason(code="screen_low_weight", score=0.7),)),
        (5, "kept", 1.0, ()),
    )
)

CERTIFICATE = ParityCertificate(
    form="adapter_stock",
    prompts=32,
    positions=512,
    dtype="float32",
    max_abs_logit_diff=1e-5,
    mean_abs_logit_diff=1e-6,
    top1_agreement=1.0,
    tolerance=1e-4,
    vs_base_max_abs_diff=3.0,
    versions={"torch": "2"},
    adapter_sha256="a" * 64,
    base_sha256="b" * 64,
    template_sha256="c" * 64,
    passed=True,
)

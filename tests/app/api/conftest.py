"""A running API for the whole test session, and a fresh project in it for each test."""

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from uuid import uuid4

import httpx2
import openai
import pytest
import uvicorn

from app.core import models, projects
from app.core.jobs import ended, jobs, lease, policy
from app.core.settings import LimitSettings, Settings
from app.core.storage.blobs import BlobStore, open_blobs, put_bytes
from app.core.storage.database import Database, migrate, open_database
from app.core.storage.tables import Form, Job, Project
from app.main import build_app
from embedded import valkey
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
from tests.support.jobs import QUICK
from worker.processes import StartedProgram

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
        alpha=0.05,
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
        (3, "downweighted", 0.25, (RowReason(code="antibody_low_weight", score=0.7),)),
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


@pytest.fixture(scope="session")
def served(
    tmp_path_factory: pytest.TempPathFactory, broker_folder: Path, broker_process: StartedProgram
) -> Iterator[Served]:
    """The API over real HTTP, with its base aligned."""
    assert broker_process.is_alive
    settings = Settings(
        data=tmp_path_factory.mktemp("api"),
        broker_url=f"redis+socket://{broker_folder / valkey.SOCKET_NAME}",
        runtime=broker_folder,
        base="tiny",
        database_seconds=2.0,
        # no worker runs here: what the reaper would end or wake must stay as the tests drive it
        lease=QUICK.model_copy(update={"ttl_seconds": 600.0, "reaper_tick_seconds": 600.0}),
        limits=LimitSettings(live_jobs=15, file_bytes=2**20, json_body_bytes=128 * 2**10, rows_max=500),
    )
    migrate(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_app(settings), log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    # the listener queues this until the app has started
    httpx2.get(f"{url}/readyz", timeout=30.0).raise_for_status()
    database = open_database(settings)
    opened = Served(url, settings, database, open_blobs(settings), projects.load_pepper(settings))
    align(opened)
    yield opened
    server.should_exit = True
    thread.join(timeout=30.0)
    database.close()


@pytest.fixture
def customer(served: Served) -> Iterator[Customer]:
    """A new project, so that lists and quotas begin empty."""
    yield from _customer(served)


@pytest.fixture
def stranger(served: Served) -> Iterator[Customer]:
    """Another tenant of the same service."""
    yield from _customer(served)


def _customer(served: Served) -> Iterator[Customer]:
    secret = projects.new_secret()
    with served.database.writing() as session:
        project = projects.ensure_project(session, f"project-{uuid4().hex}", policy="immunotune")
        projects.add_key(session, served.pepper, project, secret)
        session.commit()
    headers = {"Authorization": f"Bearer {secret}"}
    with httpx2.Client(base_url=f"{served.url}/v1", headers=headers, timeout=30.0, verify=False) as http:
        yield Customer(served, project, secret, http)


def align(served: Served) -> None:
    """Finish the align job that the API queued at start."""
    with served.database.writing() as session:
        job = models.get_alignment(session, "tiny")
        assert job is not None
        held = lease.claim(session, served.settings, job.id, WORKER)
        assert held is not None
        prefix = f"{held.prefix}/result"
        blob = put_bytes(served.blobs, f"{prefix}/alignment.zip", b"PK alignment")
        files = (ended.PublishedFile(Form.ALIGNMENT, "alignment.zip", blob),)
        summary: dict[str, object] = {"safety": safety_report(passed=True).model_dump(mode="json")}
        ended.finish(session, held, ended.Published(prefix, files, summary, 0))
        session.commit()

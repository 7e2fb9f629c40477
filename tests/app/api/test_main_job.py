"""The main job through the unmodified SDK: upload, create, watch, read results, delete."""

import base64

import openai
import pytest
from openai.types import FileObject, Model
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from app.core.broker import CPU_QUEUE, make_celery, queue_depth
from app.core.jobs import jobs, lease
from tests.support.http import METRICS_CSV, Customer, chat_rows


def test_a_good_file_is_processed_in_the_reply(customer: Customer) -> None:
    data = chat_rows(12)
    made = customer.sdk.files.create(file=("train.jsonl", data), purpose="fine-tune")
    assert (made.status, made.bytes, made.filename, made.purpose) == (
        "processed",
        len(data),
        "train.jsonl",
        "fine-tune",
    )
    assert made.model_dump()["validation"]["rows"] == 12
    assert customer.sdk.files.wait_for_processing(made.id).id == made.id
    assert customer.sdk.files.content(made.id).content == data


def test_a_deleted_file_is_gone_at_once_and_only_once(customer: Customer) -> None:
    file_id = customer.file_id()
    assert customer.sdk.files.delete(file_id).deleted
    for call in (customer.sdk.files.retrieve, customer.sdk.files.delete, customer.sdk.files.content):
        with pytest.raises(openai.NotFoundError):
            call(file_id)
    assert [file.id for file in customer.sdk.files.list()] == []


def test_files_page_by_cursor_in_both_orders(customer: Customer) -> None:
    made = [customer.file_id() for _ in range(5)]
    assert [file.id for file in customer.sdk.files.list(limit=2)] == made[::-1]
    assert [file.id for file in customer.sdk.files.list(limit=2, order="asc")] == made
    assert [file.id for file in customer.sdk.files.list(purpose="fine-tune-results")] == []
    assert [file.id for file in customer.sdk.files.list(purpose="batch")] == []


def test_a_cursor_outlives_the_file_it_names(customer: Customer) -> None:
    made = [customer.file_id() for _ in range(3)]
    customer.sdk.files.delete(made[1])
    assert [file.id for file in customer.sdk.files.list(after=made[1])] == made[:1]


def test_expiry_counts_from_creation(customer: Customer) -> None:
    made = customer.sdk.files.create(
        file=("t.jsonl", chat_rows(10)), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.expires_at is not None
    assert made.expires_at - made.created_at in range(3599, 3602)  # whole seconds of two clocks


def test_a_job_keeps_auto_until_its_files_are_checked(customer: Customer) -> None:
    made = customer.sdk.fine_tuning.jobs.create(
        model="tiny",
        training_file=customer.file_id(),
        suffix="support",
        seed=42,
        metadata={"team": "cx"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
    )
    assert made.status == "validating_files"
    assert (made.seed, made.metadata, made.hyperparameters.n_epochs) == (42, {"team": "cx"}, 2)
    assert made.hyperparameters.batch_size == "auto"
    assert made.method is not None
    assert made.method.type == "supervised"
    checked = customer.sdk.fine_tuning.jobs.retrieve(customer.job(hyperparameters={"n_epochs": 2}).id)
    assert checked.status == "queued"
    assert (checked.hyperparameters.n_epochs, checked.hyperparameters.batch_size) == (2, 8)
    assert checked.hyperparameters.learning_rate_multiplier == 1.0


def test_a_live_job_has_every_field_of_the_api(customer: Customer) -> None:
    body = customer.create().json()
    for name in (
        "finished_at",
        "fine_tuned_model",
        "trained_tokens",
        "estimated_finish",
        "error",
        "suffix",
        "retry_of",
    ):
        assert body[name] is None, name
    assert body["object"] == "fine_tuning.job"
    assert (body["result_files"], body["integrations"]) == ([], [])
    assert (body["safety"]["stage"], body["safety"]["gate"]["decision"]) == ("validate", "pending")
    assert body["project_id"] == customer.project.id


def test_jobs_filter_by_metadata(customer: Customer) -> None:
    tagged = customer.create(metadata={"team": "cx", "n": "1"}).json()["id"]
    plain = customer.create().json()["id"]
    listed = customer.sdk.fine_tuning.jobs.list
    assert [job.id for job in listed()] == [plain, tagged]
    assert [job.id for job in listed(metadata={"team": "cx"})] == [tagged]
    assert [job.id for job in listed(metadata={"team": "other"})] == []
    assert [job.id for job in listed(extra_query={"metadata": "null"})] == [plain]


def test_a_cancel_shows_in_its_own_reply_and_repeats(customer: Customer) -> None:
    job_id = customer.create().json()["id"]
    for _ in range(2):
        cancelled = customer.sdk.fine_tuning.jobs.cancel(job_id)
        assert cancelled.status == "cancelled"
        assert cancelled.finished_at is not None
    messages = [event.message for event in customer.sdk.fine_tuning.jobs.list_events(job_id)]
    assert messages == ["Fine-tuning job cancelled", f"Created fine-tuning job: {job_id}"]


def test_a_cancel_wakes_the_projects_next_job(customer: Customer) -> None:
    """Small: the slot that a cancel frees was found by the reaper, up to 40 s later."""
    celery = make_celery(customer.served.settings)
    running, waiting = customer.job(), customer.job()
    customer.claim(running)
    before = queue_depth(celery, CPU_QUEUE)
    customer.sdk.fine_tuning.jobs.cancel(running.id)
    assert before is not None
    assert queue_depth(celery, CPU_QUEUE) == before + 1
    customer.sdk.fine_tuning.jobs.cancel(running.id)
    customer.sdk.fine_tuning.jobs.cancel(waiting.id)
    assert queue_depth(celery, CPU_QUEUE) == before + 1  # nothing was freed


def test_a_running_job_estimates_its_end_and_lists_checkpoints(customer: Customer) -> None:
    job = customer.job(suffix="demo")
    held = customer.claim(job)
    saved = lease.SavedCheckpoint(5, f"{held.prefix}/checkpoints/5", "fp", {"train_loss": 0.9})
    beat = lease.Beat(
        events=(jobs.NewEvent("Step 5/20", type="metrics", data={"step": 5}),),
        checkpoints=(saved,),
        stage="train",
        progress={"step": 5, "total_steps": 20},
    )
    with customer.served.database.writing() as session:
        lease.beat(session, customer.served.settings.lease, held, beat, worker_id="worker_of_tests")
        session.commit()
    seen = customer.sdk.fine_tuning.jobs.retrieve(job.id)
    assert seen.status == "running"
    assert seen.estimated_finish is not None
    assert seen.estimated_finish >= seen.created_at
    (checkpoint,) = customer.sdk.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.step_number == 5
    assert checkpoint.metrics.train_loss == 0.9
    assert checkpoint.fine_tuned_model_checkpoint.endswith(f":demo:{job.id[-8:]}:ckpt-step-5")
    FineTuningJobCheckpoint.model_validate(checkpoint.model_dump(), strict=True)
    event = next(iter(customer.sdk.fine_tuning.jobs.list_events(job.id)))
    assert (event.type, event.data) == ("metrics", {"step": 5})


def test_a_succeeded_job_is_a_model_with_results(customer: Customer) -> None:
    job = customer.job(suffix="demo")
    customer.succeed(job)
    done = customer.sdk.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.trained_tokens, done.error) == ("succeeded", 1234, None)
    assert done.fine_tuned_model == f"ft:tiny:local:demo:{job.id[-8:]}"
    csv = customer.sdk.files.content(done.result_files[0])
    assert base64.b64decode(csv.text) == METRICS_CSV
    model = customer.sdk.models.retrieve(done.fine_tuned_model)
    assert (model.owned_by, model.model_dump()["parent"]) == (done.organization_id, "tiny")
    assert model.model_dump()["safety"]["gate"] == "pass"
    assert [model.id for model in customer.sdk.models.list()] == ["tiny", done.fine_tuned_model]
    with pytest.raises(openai.BadRequestError, match="succeeded"):
        customer.sdk.fine_tuning.jobs.cancel(job.id)


def test_a_deleted_model_is_gone_and_a_base_stays(customer: Customer) -> None:
    job = customer.job()
    customer.succeed(job)
    name = customer.sdk.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    assert name is not None
    assert "::" in name
    assert customer.sdk.models.delete(name).deleted
    with pytest.raises(openai.NotFoundError):
        customer.sdk.models.retrieve(name)
    with pytest.raises(openai.PermissionDeniedError) as refused:
        customer.sdk.models.delete("tiny")
    assert refused.value.code == "model_protected"


def test_a_file_in_use_cannot_be_deleted(customer: Customer) -> None:
    file_id = customer.file_id()
    customer.create(training_file=file_id)
    with pytest.raises(openai.BadRequestError) as refused:
        customer.sdk.files.delete(file_id)
    assert refused.value.code == "file_in_use"


def test_every_item_of_a_long_list_comes_once_while_new_ones_arrive(customer: Customer) -> None:
    file_id = customer.file_id()
    made = [customer.create(training_file=file_id).json()["id"] for _ in range(7)]
    seen = []
    for job in customer.sdk.fine_tuning.jobs.list(limit=2):
        seen.append(job.id)
        customer.create(training_file=file_id)
    assert seen == made[::-1]


def test_every_object_has_the_types_that_the_sdk_declares(customer: Customer) -> None:
    """The SDK itself does not check what it parses, so a wrong type would surface in the customer's code."""
    good, bad = customer.job(suffix="s", metadata={"a": "b"}), customer.job()
    customer.succeed(good)
    customer.fail_gate(bad)
    get = customer.http.get
    customer.create()
    jobs_seen = get("/fine_tuning/jobs").json()["data"]
    assert {job["status"] for job in jobs_seen} == {"validating_files", "succeeded", "failed"}
    for job in jobs_seen:
        FineTuningJob.model_validate(job, strict=True)
    for event in get(f"/fine_tuning/jobs/{good.id}/events").json()["data"]:
        FineTuningJobEvent.model_validate(event, strict=True)
    for model in get("/models").json()["data"]:
        Model.model_validate(model, strict=True)
    for file in get("/files").json()["data"]:
        FileObject.model_validate(file, strict=True)

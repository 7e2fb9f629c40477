"""The protocol around every route: keys, methods, headers, repeats, and what a fault of ours says."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from sqlalchemy import select

from app.core import projects
from app.core.storage.tables import Project
from tests.app.api.test_hostile_requests import check_envelope
from tests.support.backends import lock_out
from tests.support.http import Customer, chat_rows
from tests.support.waiting import wait_until

ROUTES = [
    ("GET", "/files"),
    ("POST", "/files"),
    ("GET", "/files/file-0000000000000000000000"),
    ("DELETE", "/files/file-0000000000000000000000"),
    ("GET", "/files/file-0000000000000000000000/content"),
    ("GET", "/files/file-0000000000000000000000/validation"),
    ("GET", "/fine_tuning/jobs"),
    ("POST", "/fine_tuning/jobs"),
    ("GET", "/fine_tuning/jobs/ftjob-000000000000000000000000"),
    ("POST", "/fine_tuning/jobs/ftjob-000000000000000000000000/cancel"),
    ("GET", "/fine_tuning/jobs/ftjob-000000000000000000000000/events"),
    ("GET", "/fine_tuning/jobs/ftjob-000000000000000000000000/checkpoints"),
    ("GET", "/fine_tuning/jobs/ftjob-000000000000000000000000/safety"),
    ("GET", "/fine_tuning/jobs/ftjob-000000000000000000000000/rows"),
    ("GET", "/fine_tuning/jobs/ftjob-000000000000000000000000/parity"),
    ("GET", "/fine_tuning/jobs/ftjob-000000000000000000000000/artifacts"),
    ("GET", "/fine_tuning/jobs/ftjob-000000000000000000000000/artifacts/adapter"),
    ("GET", "/models"),
    ("GET", "/models/tiny"),
    ("DELETE", "/models/tiny"),
    ("POST", "/chat/completions"),
]


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic eDp5", "Bearer \xff"])
def test_no_route_answers_without_a_key(customer: Customer, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    with httpx2.Client(base_url=f"{customer.served.url}/v1", headers=headers, verify=False, timeout=30.0) as anybody:
        for method, path in ROUTES:
            reply = anybody.request(method, path)
            check_envelope(reply, 401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"


def test_an_absent_id_is_404_on_every_route(customer: Customer) -> None:
    for method, path in ROUTES:
        if "0000" in path:
            check_envelope(customer.http.request(method, path), 404, "not_found")


def test_a_key_in_the_url_is_refused_even_if_valid(customer: Customer) -> None:
    check_envelope(customer.http.get("/files", params={"api_key": customer.key}), 401, "invalid_api_key")


def test_two_authorization_headers_are_ambiguous(customer: Customer) -> None:
    headers = [("Authorization", f"Bearer {customer.key}"), ("Authorization", "Bearer x")]
    reply = httpx2.get(f"{customer.served.url}/v1/files", headers=headers, verify=False, timeout=30.0)
    check_envelope(reply, 400, "invalid_value", "authorization")


@pytest.mark.parametrize("header", ["OpenAI-Organization", "OpenAI-Project"])
def test_a_foreign_tenant_header_is_refused(customer: Customer, header: str) -> None:
    check_envelope(customer.http.get("/files", headers={header: "org-other"}), 401, "mismatched_project")


def test_the_own_tenant_headers_are_fine(customer: Customer) -> None:
    reply = customer.http.get("/files", headers={"OpenAI-Project": customer.project.id})
    assert reply.headers["openai-organization"] == customer.project.org_id


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/v1/nothing", "API reference"),
        ("/files", "/v1/files"),
        ("/", "base_url"),
        ("/v1", "API reference"),
        ("/v1/responses", "/v1/chat/completions"),
        ("/v1/embeddings", "no embeddings"),
        ("/v1/files/x/y/z", "API reference"),
        ("/docs", "base_url"),
    ],
)
def test_an_unknown_url_gives_a_hint(customer: Customer, path: str, hint: str) -> None:
    error = check_envelope(httpx2.get(f"{customer.served.url}{path}", verify=False, timeout=30.0), 404, "unknown_url")
    assert hint in str(error["message"])


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/files", "GET, POST"),
        ("TRACE", "/files", "GET, POST"),
        ("PATCH", "/files/file-0000000000000000000000", "DELETE, GET"),
        ("POST", "/files/file-0000000000000000000000/content", "GET, HEAD"),
        ("DELETE", "/fine_tuning/jobs/ftjob-000000000000000000000000", "GET"),
        ("GET", "/fine_tuning/jobs/ftjob-000000000000000000000000/cancel", "POST"),
        ("POST", "/models", "GET"),
    ],
)
def test_a_wrong_method_says_which_are_right(customer: Customer, method: str, path: str, allowed: str) -> None:
    reply = customer.http.request(method, path, headers={"X-HTTP-Method-Override": "GET"})
    check_envelope(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == allowed


def test_one_trailing_slash_is_forgiven_without_a_redirect(customer: Customer) -> None:
    reply = customer.http.get("/files/", follow_redirects=False)
    assert reply.status_code == 200


def test_every_reply_has_its_own_request_id(customer: Customer) -> None:
    sent = {"x-request-id": "mine", "X-Client-Request-Id": "mine"}
    first, second = (customer.http.get("/files", headers=sent).headers for _ in range(2))
    assert first["x-request-id"] != second["x-request-id"]
    assert first["x-request-id"].startswith("req_")
    assert int(first["openai-processing-ms"]) >= 0
    assert (first["cache-control"], first["x-content-type-options"]) == ("no-store", "nosniff")


def test_health_needs_no_key(customer: Customer) -> None:
    for path in ("/healthz", "/readyz"):
        reply = httpx2.get(f"{customer.served.url}{path}", verify=False, timeout=30.0)
        assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


def test_a_job_poll_can_cost_304(customer: Customer) -> None:
    path = f"/fine_tuning/jobs/{customer.create().json()['id']}"
    etag = customer.http.get(path).headers["etag"]
    unchanged = customer.http.get(path, headers={"If-None-Match": etag})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    customer.http.post(f"{path}/cancel")
    assert customer.http.get(path, headers={"If-None-Match": etag}).status_code == 200


def test_a_keyed_create_has_one_effect(customer: Customer) -> None:
    body = {"model": "tiny", "training_file": customer.file_id()}
    first, second = (
        customer.http.post("/fine_tuning/jobs", json=body, headers={"Idempotency-Key": "k1"}) for _ in range(2)
    )
    assert first.json() == second.json()
    assert "x-idempotent-replay" not in first.headers
    assert second.headers["x-idempotent-replay"] == "true"
    other = customer.http.post("/fine_tuning/jobs", json=body | {"seed": 1}, headers={"Idempotency-Key": "k1"})
    check_envelope(other, 400, "idempotency_key_reused")
    assert len(customer.http.get("/fine_tuning/jobs").json()["data"]) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "\u00e9"])
def test_a_bad_idempotency_key_is_refused(customer: Customer, key: str) -> None:
    body = {"model": "tiny", "training_file": customer.file_id()}
    headers = {"Idempotency-Key": key.encode("latin-1")}
    reply = customer.http.post("/fine_tuning/jobs", json=body, headers=headers)
    check_envelope(reply, 400, "invalid_idempotency_key")


def test_a_retry_of_the_sdk_gets_the_first_reply(customer: Customer) -> None:
    body = {"model": "tiny", "training_file": customer.file_id()}
    first = customer.http.post("/fine_tuning/jobs", json=body, headers={"x-stainless-retry-count": "0"})
    retried = customer.http.post(
        "/fine_tuning/jobs", json=dict(reversed(body.items())), headers={"x-stainless-retry-count": "1"}
    )
    assert retried.json() == first.json()
    assert retried.headers["x-idempotent-replay"] == "true"
    again = customer.http.post("/fine_tuning/jobs", json=body, headers={"x-stainless-retry-count": "0"})
    assert again.json()["id"] != first.json()["id"]


def test_a_retried_upload_is_one_file_whatever_its_boundary(customer: Customer) -> None:
    def upload(boundary: str, retry: int, data: bytes) -> httpx2.Response:
        files = {"file": ("t.jsonl", data)}
        headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "x-stainless-retry-count": str(retry),
        }
        return customer.http.post("/files", files=files, data={"purpose": "fine-tune"}, headers=headers)

    first, retried = upload("aaa", 0, chat_rows(10)), upload("bbb", 1, chat_rows(10))
    assert retried.json() == first.json()
    assert upload("ccc", 1, chat_rows(11)).json()["id"] != first.json()["id"]
    stored = [blob.key for blob in customer.served.blobs.list(f"files/{customer.project.id}/")]
    assert len(stored) == 2


def test_the_sdk_retries_through_a_locked_database(customer: Customer) -> None:
    """A writer that holds the lock past the timeout gives 503 with Retry-After; nothing was done."""
    file_id = customer.file_id()
    with lock_out(customer.served.database):
        reply = customer.create(training_file=file_id)
    assert reply.status_code == 503
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "overloaded")
    assert reply.headers["retry-after"] == "5"
    assert customer.http.get("/fine_tuning/jobs").json()["data"] == []


@pytest.mark.parametrize("repeated", [{"Idempotency-Key": "k"}, {"x-stainless-retry-count": "1"}])
def test_a_retry_that_overlaps_its_first_attempt_makes_no_second_job(
    customer: Customer, repeated: dict[str, str]
) -> None:
    """S3: the SDK repeats a create that is slow; the repeat waits or gets 409, and there is one job in the end."""
    body = {"model": "tiny", "training_file": customer.file_id()}
    first_headers = repeated if "Idempotency-Key" in repeated else {"x-stainless-retry-count": "0"}

    def create(headers: dict[str, str]) -> httpx2.Response:
        return customer.http.post("/fine_tuning/jobs", json=body, headers=headers)

    with ThreadPoolExecutor(2) as pool:
        with lock_out(customer.served.database) as waiting:
            first = pool.submit(create, first_headers)
            wait_until(lambda: waiting() >= 1, seconds=10)
            second = pool.submit(create, repeated)
            wait_until(lambda: second.done() or waiting() >= 2, seconds=10)
        made, overlapping = first.result(30), second.result(30)
    assert made.status_code == 200
    if overlapping.status_code == 409:
        check_envelope(overlapping, 409, "request_in_progress")
        assert overlapping.headers["retry-after"] == "1"
        overlapping = create(repeated)
    assert overlapping.json() == made.json()
    assert overlapping.headers["x-idempotent-replay"] == "true"
    assert len(customer.http.get("/fine_tuning/jobs").json()["data"]) == 1


def test_a_retry_that_overlaps_its_upload_makes_no_second_file(customer: Customer) -> None:
    """S3: an upload whose reply is late is sent again; one file and one blob stay."""
    data = chat_rows(10)

    def upload(retry: int) -> httpx2.Response:
        headers = {"x-stainless-retry-count": str(retry)}
        files = {"file": ("t.jsonl", data)}
        return customer.http.post("/files", files=files, data={"purpose": "fine-tune"}, headers=headers)

    with ThreadPoolExecutor(2) as pool:
        with lock_out(customer.served.database) as waiting:
            first = pool.submit(upload, 0)
            wait_until(lambda: waiting() >= 1, seconds=10)
            second = pool.submit(upload, 1)
            wait_until(lambda: second.done() or waiting() >= 2, seconds=10)
        made, overlapping = first.result(30), second.result(30)
    assert made.status_code == 200
    if overlapping.status_code == 409:
        overlapping = upload(1)
    assert overlapping.json() == made.json()
    assert len(customer.http.get("/files").json()["data"]) == 1
    assert len(list(customer.served.blobs.list(f"files/{customer.project.id}/"))) == 1


def test_a_keyed_cancel_is_replayed(customer: Customer) -> None:
    """S3: cancel honours Idempotency-Key like every POST that changes something."""
    job_id = customer.create().json()["id"]
    first, second = (
        customer.http.post(f"/fine_tuning/jobs/{job_id}/cancel", headers={"Idempotency-Key": "k"}) for _ in range(2)
    )
    assert first.json() == second.json()
    assert second.headers["x-idempotent-replay"] == "true"


def test_two_keys_of_a_project_do_not_share_replies(customer: Customer) -> None:
    """S3: the contract says per API key, not per project."""
    secret = projects.new_secret()
    with customer.served.database.writing() as session:
        projects.add_key(session, customer.served.pepper, customer.project, secret)
        session.commit()
    body = {"model": "tiny", "training_file": customer.file_id()}
    replies = [
        customer.http.post(
            "/fine_tuning/jobs", json=body, headers={"Authorization": f"Bearer {key}", "Idempotency-Key": "k"}
        )
        for key in (customer.key, secret)
    ]
    assert replies[0].json()["id"] != replies[1].json()["id"]


def test_simultaneous_cancels_agree(customer: Customer) -> None:
    job_id = customer.create().json()["id"]
    states: list[str] = []

    def cancel() -> None:
        reply = httpx2.post(
            f"{customer.served.url}/v1/fine_tuning/jobs/{job_id}/cancel",
            headers={"Authorization": f"Bearer {customer.key}"},
            verify=False,
            timeout=30.0,
        )
        states.append(reply.json()["status"])

    threads = [threading.Thread(target=cancel) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states == ["cancelled"] * 4
    events = customer.http.get(f"/fine_tuning/jobs/{job_id}/events").json()["data"]
    assert len(events) == 2


def test_too_many_waiting_jobs_are_not_retried(customer: Customer) -> None:
    file_id = customer.file_id()
    limit = customer.served.settings.limits.live_jobs
    for _ in range(limit):
        assert customer.create(training_file=file_id).status_code == 200
    with pytest.raises(openai.RateLimitError) as refused:
        customer.sdk.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    assert (refused.value.code, refused.value.type) == ("too_many_jobs", "insufficient_quota")
    assert refused.value.response.headers["x-should-retry"] == "false"


def has_no_thread(customer: Customer) -> bool:
    """Whether a route that needs one of the shared threads must wait."""
    try:
        httpx2.get(f"{customer.served.url}/readyz", verify=False, timeout=0.5)
    except httpx2.ReadTimeout:
        return True
    return False


def test_liveness_needs_no_thread(customer: Customer) -> None:
    """S5 f: requests that wait for a lock hold every thread; the process is alive nevertheless, and says so."""
    file_id = customer.file_id()
    with customer.served.database.writing() as session, ThreadPoolExecutor(48) as clients:
        session.execute(select(Project.seq).where(Project.id == customer.project.id).with_for_update())
        waiting = [clients.submit(customer.create, training_file=file_id) for _ in range(48)]
        wait_until(lambda: has_no_thread(customer), seconds=30)
        started = time.monotonic()
        assert httpx2.get(f"{customer.served.url}/healthz", verify=False, timeout=30.0).status_code == 200
        assert time.monotonic() - started < 1.0
        assert sum(not one.done() for one in waiting) > 1

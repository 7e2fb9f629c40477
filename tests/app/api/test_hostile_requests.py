"""Hostile requests: status, type, code and param of each answer."""

import json
import socket
from urllib.parse import urlsplit

import httpx2
import pytest
from sqlalchemy import select

from app.core.ids import Prefix, new_id
from app.core.storage.tables import ApiKey
from tests.support.http import Customer, chat_rows


def check_envelope(reply: httpx2.Response, status: int, code: str, param: str | None = None) -> dict[str, object]:
    """Assert the one shape that every error has; returns the error."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"].startswith("req_")
    error = reply.json()["error"]
    assert set(error) - {"details"} == {"message", "type", "param", "code"}
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
    assert error["message"]
    return dict(error)


CREATE_FAULTS: list[tuple[dict[str, object], str, str | None]] = [
    ({"suffix": "a:b"}, "invalid_suffix", "suffix"),
    ({"suffix": "../x"}, "invalid_suffix", "suffix"),
    ({"suffix": "a\nb"}, "invalid_suffix", "suffix"),
    ({"suffix": "x" * 65}, "invalid_suffix", "suffix"),
    ({"suffix": "ckpt-step-1"}, "invalid_suffix", "suffix"),
    ({"suffix": "<script>"}, "invalid_suffix", "suffix"),
    ({"suffix": "a\x00"}, "invalid_value", "suffix"),
    ({"suffix": 7}, "invalid_type", "suffix"),
    ({"seed": 2**63}, "invalid_value", "seed"),
    ({"seed": -1}, "invalid_value", "seed"),
    ({"seed": "1"}, "invalid_type", "seed"),
    ({"seed": True}, "invalid_type", "seed"),
    ({"metadata": {str(n): "v" for n in range(17)}}, "invalid_value", "metadata"),
    ({"metadata": {"a": 1}}, "invalid_value", "metadata"),
    ({"metadata": {"k" * 65: "v"}}, "invalid_value", "metadata"),
    ({"metadata": {"k": "v" * 513}}, "invalid_value", "metadata"),
    ({"metadata": []}, "invalid_type", "metadata"),
    ({"hyperparameters": {"n_epochs": 0}}, "invalid_value", "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": 51}}, "invalid_value", "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": "auto "}}, "invalid_value", "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": 1.5}}, "invalid_value", "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": True}}, "invalid_value", "hyperparameters.n_epochs"),
    ({"hyperparameters": {"batch_size": 10**9}}, "invalid_value", "hyperparameters.batch_size"),
    (
        {"hyperparameters": {"learning_rate_multiplier": -1}},
        "invalid_value",
        "hyperparameters.learning_rate_multiplier",
    ),
    (
        {"hyperparameters": {"learning_rate_multiplier": "NaN"}},
        "invalid_value",
        "hyperparameters.learning_rate_multiplier",
    ),
    ({"hyperparameters": {"epochs": 1}}, "unknown_parameter", "hyperparameters.epochs"),
    (
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}}},
        "invalid_value",
        "method.supervised.hyperparameters.n_epochs",
    ),
    (
        {
            "hyperparameters": {"n_epochs": 1},
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        },
        "conflicting_hyperparameters",
        "hyperparameters.n_epochs",
    ),
    ({"method": {"type": "dpo", "supervised": {}}}, "invalid_value", "method.supervised"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "unsupported_method", "method.type"),
    ({"method": {"type": "reinforcement"}}, "unsupported_method", "method.type"),
    ({"method": {"type": "magic"}}, "invalid_value", "method.type"),
    ({"method": {}}, "missing_required_parameter", "method.type"),
    ({"integrations": [{"type": "wandb"}]}, "integration_not_configured", "integrations"),
    ({"dry_run": True}, "unsupported_parameter", "dry_run"),
    ({"model": "../../base"}, "model_not_found", "model"),
    ({"model": "/etc/passwd"}, "model_not_found", "model"),
    ({"model": "file:///etc/passwd"}, "model_not_found", "model"),
    ({"model": "https://example.invalid/x"}, "model_not_found", "model"),
    ({"model": "ft:tiny:local::12345678"}, "model_not_fine_tunable", "model"),
    ({"model": None}, "invalid_type", "model"),
    ({"training_file": "file-0000000000000000000000"}, "invalid_training_file", "training_file"),
    ({"training_file": "../../x"}, "invalid_training_file", "training_file"),
    ({"validation_file": "file-0000000000000000000000"}, "invalid_validation_file", "validation_file"),
    ({"safety": {"gate": {"max_harmful_score": 1.0}}}, "safety_policy_violation", "safety.gate.max_harmful_score"),
    ({"safety": {"antidote": {"enabled": False}}}, "safety_policy_violation", "safety.antidote.enabled"),
    ({"safety": {"gte": {}}}, "unknown_parameter", "safety.gte"),
    ({"lora": {"r": 65}}, "invalid_value", "lora.r"),
    ({"lora": {"target_modules": ["lm_head"]}}, "invalid_value", "lora.target_modules"),
    ({"n_epochs": 3}, "unknown_parameter", "n_epochs"),
]


# The operator chooses how a job is defended; each names a real defence, policy or recipe field.
CHOSEN_DEFENCES: list[tuple[dict[str, object], str, str]] = [
    ({"defence": "plain"}, "unknown_parameter", "defence"),
    ({"policy": "plain"}, "unknown_parameter", "policy"),
    ({"recipe": {"screen": {"enabled": False}}}, "unknown_parameter", "recipe"),
    ({"screen": {"enabled": False}}, "unknown_parameter", "screen"),
    ({"alignment": "sft"}, "unknown_parameter", "alignment"),
    ({"judge": "refusal-marker"}, "unknown_parameter", "judge"),
    ({"method": {"type": "plain"}}, "invalid_value", "method.type"),
    ({"method": {"type": "supervised", "defence": "sft"}}, "unknown_parameter", "method.defence"),
    (
        {"method": {"type": "supervised", "supervised": {"defence": "sft"}}},
        "unknown_parameter",
        "method.supervised.defence",
    ),
    ({"hyperparameters": {"defence": "sft"}}, "unknown_parameter", "hyperparameters.defence"),
    ({"safety": {"defence": "plain"}}, "unknown_parameter", "safety.defence"),
    ({"safety": {"policy": "pol_plain@1"}}, "unknown_parameter", "safety.policy"),
    ({"safety": {"gate": {"enabled": False}}}, "unknown_parameter", "safety.gate.enabled"),
    ({"safety": {"antibody": {"enabled": False}}}, "safety_policy_violation", "safety.antibody.enabled"),
]


@pytest.mark.parametrize(("fields", "code", "param"), CHOSEN_DEFENCES, ids=lambda value: str(value)[:60])
def test_a_client_cannot_choose_how_its_job_is_defended(
    customer: Customer, fields: dict[str, object], code: str, param: str
) -> None:
    error = check_envelope(customer.create(**fields), 400, code, param)
    assert param.rpartition(".")[2] in str(error["message"])
    assert customer.http.get("/fine_tuning/jobs").json()["data"] == []


@pytest.mark.parametrize(("fields", "code", "param"), CREATE_FAULTS, ids=lambda value: str(value)[:60])
def test_a_bad_create_is_refused_and_makes_nothing(
    customer: Customer, fields: dict[str, object], code: str, param: str | None
) -> None:
    check_envelope(customer.create(**fields), 400, code, param)
    assert customer.http.get("/fine_tuning/jobs").json()["data"] == []


@pytest.mark.parametrize(
    "fields",
    [
        {"safety": None},
        {"safety": {"gate": {"max_harmful_score": 0.05}}},
        {"metadata": {"a": "<script>${jndi:x}"}},
        {"suffix": None, "seed": None, "validation_file": None, "integrations": [], "lora": None},
        {"lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj"]}},
    ],
    ids=str,
)
def test_a_stricter_or_odd_create_is_accepted(customer: Customer, fields: dict[str, object]) -> None:
    reply = customer.create(**fields)
    assert reply.status_code == 200, reply.text
    if "metadata" in fields:
        assert reply.json()["metadata"] == fields["metadata"]


def test_a_result_file_is_no_training_file(customer: Customer) -> None:
    job = customer.job()
    customer.succeed(job)
    results = customer.http.get(f"/fine_tuning/jobs/{job.id}").json()["result_files"]
    check_envelope(customer.create(training_file=results[0]), 400, "invalid_training_file", "training_file")


BAD_JSON: list[tuple[bytes, str, str | None]] = [
    (b'{"model":"\\udc00"}', "invalid_json", None),
    (b'{"model":"\\u0000"}', "invalid_value", "model"),
    (b"[" * 100_000, "invalid_json", None),
    (b'{"model":"a","model":"b"}', "invalid_json", None),
    (b'{"seed":NaN}', "invalid_json", None),
    (b'{"seed":1e999}', "invalid_json", None),
    (b'{"seed":' + b"9" * 5000 + b"}", "invalid_value", "seed"),
    ('{"model":"a"}'.encode("utf-16"), "invalid_json", None),
    (b'{"model":"\xff"}', "invalid_json", None),
    (b"{", "invalid_json", None),
    (b"[]", "invalid_request_body", None),
    (b"null", "invalid_request_body", None),
    (b"", "missing_required_parameter", "model"),
    (b"{}", "missing_required_parameter", "model"),
]


@pytest.mark.parametrize(("body", "code", "param"), BAD_JSON, ids=lambda value: str(value)[:40])
def test_a_body_has_one_meaning_or_none(customer: Customer, body: bytes, code: str, param: str | None) -> None:
    reply = customer.http.post("/fine_tuning/jobs", content=body, headers={"Content-Type": "application/json"})
    check_envelope(reply, 400, code, param)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_json_must_say_that_it_is_json(customer: Customer, kind: str) -> None:
    reply = customer.http.post("/fine_tuning/jobs", content=b'{"model":"tiny"}', headers={"Content-Type": kind})
    check_envelope(reply, 415, "unsupported_media_type")


def test_a_packed_body_is_refused_unread(customer: Customer) -> None:
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    check_envelope(
        customer.http.post("/fine_tuning/jobs", content=b"x" * 1000, headers=headers), 415, "unsupported_media_type"
    )


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_over_the_limit_is_refused_at_the_limit(customer: Customer, *, is_chunked: bool) -> None:
    body = b"{" + b" " * 140_000 + b"}"
    content = iter([body[:100_000], body[100_000:]]) if is_chunked else body
    reply = customer.http.post("/fine_tuning/jobs", content=content, headers={"Content-Type": "application/json"})
    check_envelope(reply, 413, "request_too_large")


def test_a_file_over_the_limit_is_refused_and_not_kept(customer: Customer) -> None:
    check_envelope(customer.upload(b"x" * (2**20 + 1)), 413, "request_too_large", "file")
    check_envelope(customer.upload(b"x" * 2**21), 413, "request_too_large")
    assert list(customer.served.blobs.list(f"files/{customer.project.id}/")) == []


PATHS = [
    ("/files/..%2F..%2Fx", "not_found"),
    ("/files/%252e%252e", "not_found"),
    ("/files/a%00b", "not_found"),
    ("/files/a%20b", "not_found"),
    ("/files/a%0Ab", "not_found"),
    ("/files/%F0%9F%98%80", "not_found"),
    (f"/files/{'x' * 7000}", "not_found"),
    ("/fine_tuning/jobs/..%2Fx", "not_found"),
    ("/fine_tuning/jobs/ftjob-0/events", "not_found"),
    ("/fine_tuning/jobs/ftjob-0/artifacts/adapter", "not_found"),
]


@pytest.mark.parametrize(("path", "code"), PATHS, ids=lambda value: str(value)[:40])
def test_an_odd_id_is_absent(customer: Customer, path: str, code: str) -> None:
    check_envelope(customer.http.get(path), 404, code)


@pytest.mark.parametrize("name", ["org%2Fname", "ft:a%2Fb", "..%2F..%2Fbase", "%2Fetc%2Fpasswd", "a%00b", "%20"])
def test_an_odd_model_name_is_absent(customer: Customer, name: str) -> None:
    check_envelope(customer.http.get(f"/models/{name}"), 404, "model_not_found", "model")


def test_a_name_may_be_encoded(customer: Customer) -> None:
    job = customer.job()
    customer.succeed(job)
    name = customer.http.get(f"/fine_tuning/jobs/{job.id}").json()["fine_tuned_model"]
    assert customer.http.get(f"/models/{name.replace(':', '%3A')}").json()["id"] == name


def test_a_dotted_path_is_not_resolved(customer: Customer) -> None:
    # a raw request: clients tidy such paths before they send them
    for path in ("/v1/files/%2e%2e/x", "/v1/files/../models", "/v1//files"):
        status, body = raw_get(customer, path)
        assert (status, body["error"]["code"]) == (404, "unknown_url")


def raw_get(customer: Customer, path: str) -> tuple[int, dict[str, dict[str, object]]]:
    """GET exactly this path."""
    address = urlsplit(customer.served.url)
    assert address.hostname is not None
    with socket.create_connection((address.hostname, address.port or 0), timeout=10) as connection:
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {customer.key}\r\n"
        head += "Connection: close\r\n\r\n"
        connection.sendall(head.encode())
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    head_bytes, _, body = reply.partition(b"\r\n\r\n")
    return int(head_bytes.split()[1]), json.loads(body)


def test_a_long_url_is_refused(customer: Customer) -> None:
    check_envelope(customer.http.get(f"/files/{'x' * 10_000}"), 431, "headers_too_large")


def test_a_foreign_id_answers_like_an_absent_one(customer: Customer, stranger: Customer) -> None:
    file_id, job_id = stranger.file_id(), stranger.create().json()["id"]
    for path, theirs, nobodys in (
        ("/files/{}", file_id, new_id(Prefix.FILE)),
        ("/files/{}/content", file_id, new_id(Prefix.FILE)),
        ("/fine_tuning/jobs/{}", job_id, new_id(Prefix.JOB)),
        ("/fine_tuning/jobs/{}/events", job_id, new_id(Prefix.JOB)),
        ("/fine_tuning/jobs/{}/safety", job_id, new_id(Prefix.JOB)),
    ):
        foreign, absent = customer.http.get(path.format(theirs)), customer.http.get(path.format(nobodys))
        check_envelope(foreign, 404, "not_found")
        assert foreign.text.replace(theirs, "") == absent.text.replace(nobodys, "")
    check_envelope(customer.create(training_file=file_id), 400, "invalid_training_file", "training_file")
    check_envelope(customer.http.get("/files", params={"after": file_id}), 400, "invalid_cursor", "after")
    check_envelope(customer.http.post(f"/fine_tuning/jobs/{job_id}/cancel"), 404, "not_found")


@pytest.mark.parametrize("limit", ["-1", "0", "1000000000", "abc", "5.5", "1&limit=2", "", "+1", "%D9%A3"])
@pytest.mark.parametrize("path", ["/files", "/fine_tuning/jobs"])
def test_a_bad_limit_is_refused(customer: Customer, path: str, limit: str) -> None:
    check_envelope(customer.http.get(f"{path}?limit={limit}"), 400, "invalid_limit", "limit")


@pytest.mark.parametrize("path", ["/files", "/fine_tuning/jobs"])
def test_a_bad_cursor_is_refused(customer: Customer, path: str) -> None:
    for after in ("", "nobody", "a%00b"):
        check_envelope(customer.http.get(f"{path}?after={after}"), 400, "invalid_cursor", "after")


def test_a_bad_order_is_refused(customer: Customer) -> None:
    check_envelope(customer.http.get("/files?order=sideways"), 400, "invalid_value", "order")


@pytest.mark.parametrize(
    "query",
    [
        "metadata[a]=1&metadata=null",
        "metadata=1",
        "metadata[a]=1&metadata[a]=2",
        "&".join(f"metadata[{n}]=v" for n in range(17)),
        "metadata[]=1",
    ],
)
def test_a_bad_metadata_filter_is_refused(customer: Customer, query: str) -> None:
    check_envelope(customer.http.get(f"/fine_tuning/jobs?{query}"), 400, "invalid_value", "metadata")


def form(*parts: tuple[str, bytes], boundary: str = "b") -> bytes:
    """A multipart body of these (Content-Disposition rest, data) parts."""
    body = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {rest}\r\n\r\n".encode() + data + b"\r\n"
        for rest, data in parts
    )
    return body + f"--{boundary}--\r\n".encode()


FILE = ('name="file"; filename="t.jsonl"', chat_rows(10))
PURPOSE = ('name="purpose"', b"fine-tune")
ANCHOR = ('name="expires_after[anchor]"', b"created_at")

BAD_FORMS: list[tuple[bytes, str, str | None]] = [
    (form(FILE), "missing_required_parameter", "purpose"),
    (form(PURPOSE), "missing_required_parameter", "file"),
    (form(FILE, FILE, PURPOSE), "invalid_request_body", None),
    (form(FILE, PURPOSE, PURPOSE), "invalid_request_body", None),
    (form(*[PURPOSE] * 1000), "invalid_request_body", None),
    (form(FILE, PURPOSE)[:-5], "invalid_request_body", None),
    (form(FILE, PURPOSE)[:100], "invalid_request_body", None),
    (b"not a form", "invalid_request_body", None),
    (b"", "invalid_request_body", None),
    (form(('name="file"', b"x"), PURPOSE), "invalid_request_body", None),
    (form(("filename=x", b"x"), PURPOSE), "invalid_request_body", None),
    (form(('name="file"; filename="t"\r\nContent-Type: multipart/mixed', b"x"), PURPOSE), "invalid_request_body", None),
    (form(('name="file"; filename="t"\r\nX: ' + "y" * 20_000, b"x"), PURPOSE), "invalid_request_body", None),
    (form(('name="extra"', b"x"), FILE, PURPOSE), "unknown_parameter", "extra"),
    (form(('name="file"; filename="t"', b""), PURPOSE), "invalid_value", "file"),
    (form(FILE, ('name="purpose"', b"assistants")), "unsupported_purpose", "purpose"),
    (form(FILE, ('name="purpose"', b"FINE-TUNE")), "unsupported_purpose", "purpose"),
    (form(('name="purpose"', b"evals"), FILE), "unsupported_purpose", "purpose"),
    (form(FILE, ('name="purpose"', b"x" * 5000)), "invalid_value", "purpose"),
    (form(FILE, ('name="purpose"', b"\xff")), "invalid_value", "purpose"),
    (form(FILE, PURPOSE, ANCHOR), "missing_required_parameter", "expires_after[seconds]"),
    (
        form(FILE, PURPOSE, ANCHOR, ('name="expires_after[seconds]"', b"10")),
        "invalid_value",
        "expires_after[seconds]",
    ),
    (
        form(FILE, PURPOSE, ANCHOR, ('name="expires_after[seconds]"', b"2678400")),
        "invalid_value",
        "expires_after[seconds]",
    ),
    (
        form(
            FILE,
            PURPOSE,
            ('name="expires_after[anchor]"', b"last_active_at"),
            ('name="expires_after[seconds]"', b"3600"),
        ),
        "invalid_value",
        "expires_after[anchor]",
    ),
]


@pytest.mark.parametrize(("body", "code", "param"), BAD_FORMS, ids=lambda value: str(value)[-50:])
def test_a_bad_form_is_refused_and_keeps_nothing(customer: Customer, body: bytes, code: str, param: str | None) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    check_envelope(customer.http.post("/files", content=body, headers=kind), 400, code, param)
    assert list(customer.served.blobs.list(f"files/{customer.project.id}/")) == []
    assert customer.http.get("/files").json()["data"] == []


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary="])
def test_a_form_needs_a_boundary(customer: Customer, kind: str) -> None:
    reply = customer.http.post("/files", content=form(FILE, PURPOSE), headers={"Content-Type": kind})
    check_envelope(reply, 400, "invalid_request_body")


def test_an_upload_that_is_no_form_is_refused(customer: Customer) -> None:
    check_envelope(customer.http.post("/files", json={"purpose": "fine-tune"}), 415, "unsupported_media_type")


@pytest.mark.parametrize(("body", "status"), [(b"", 200), (b"{}", 200), (b'{"force":true}', 400)])
def test_a_cancel_takes_an_empty_body(customer: Customer, body: bytes, status: int) -> None:
    job_id = customer.create().json()["id"]
    kind = {"Content-Type": "application/json"}
    reply = customer.http.post(f"/fine_tuning/jobs/{job_id}/cancel", content=body, headers=kind)
    assert reply.status_code == status
    if status == 400:
        check_envelope(reply, 400, "unknown_parameter", "force")


@pytest.mark.parametrize("path", ["/files", "/fine_tuning/jobs", "/models"])
@pytest.mark.parametrize(
    "query",
    ["metadata[k]=%00", "metadata[k%00]=v", "purpose=fine-tune%00", "order=%1b", "x=%7f", "x=a%0D%0Ab"],
)
def test_a_control_character_in_a_query_is_refused(customer: Customer, path: str, query: str) -> None:
    """S16: Postgres takes no NUL in any value, so no list may see one, whatever its parameters are."""
    name = "metadata" if "metadata" in query else query.partition("=")[0]
    check_envelope(customer.http.get(f"{path}?{query}"), 400, "invalid_value", name)


def test_metadata_of_several_lines_can_be_asked_for(customer: Customer) -> None:
    """Review: a job is made with such a value, and could not be found by it."""
    job = customer.job(metadata={"note": "two\n\tlines\x7f"})
    found = customer.http.get("/fine_tuning/jobs", params={"metadata[note]": "two\n\tlines\x7f"}).json()["data"]
    assert [item["id"] for item in found] == [job.id]


@pytest.mark.parametrize("after", ["a%00b", "x" * 5000, "file-..", "%F0%9F%98%80", "ftjob-0"])
@pytest.mark.parametrize(
    "path", ["/files", "/fine_tuning/jobs", "/fine_tuning/jobs/{}/events", "/fine_tuning/jobs/{}/checkpoints"]
)
def test_a_cursor_has_the_shape_of_its_ids(customer: Customer, path: str, after: str) -> None:
    """S16: what is no id is never asked of the database."""
    place = path.format(new_id(Prefix.JOB))  # no such job: the cursor is refused before the job is looked for
    check_envelope(customer.http.get(f"{place}?after={after}"), 400, "invalid_cursor", "after")


def test_weights_by_their_file_id_need_the_scope_of_artifacts(customer: Customer) -> None:
    """S25: the same bytes have the same lock on both doors; a results CSV is no artifact."""
    job = customer.job()
    customer.succeed(job)
    listed = customer.http.get(f"/fine_tuning/jobs/{job.id}/artifacts").json()["data"]
    results = customer.http.get(f"/fine_tuning/jobs/{job.id}").json()["result_files"][0]
    own = customer.file_id()
    with customer.served.database.writing() as session:
        key = session.scalars(select(ApiKey).where(ApiKey.project_id == customer.project.id)).one()
        key.scopes = ["files:r"]
        session.commit()
    for item in listed:
        check_envelope(customer.http.get(f"/files/{item['file_id']}/content"), 403, "insufficient_scope")
        assert customer.http.head(f"/files/{item['file_id']}/content").status_code == 403
    for file_id in (own, results):
        assert customer.http.get(f"/files/{file_id}/content").status_code == 200

"""Downloads: ranges, conditions and headers, and what the release gate holds back."""

import base64
import hashlib

import httpx2
import pytest

from app.api.http.downloads import Span, parse_range
from app.api.http.exception_handlers import ProtocolError
from tests.app.api.test_hostile_requests import check_envelope
from tests.support.http import METRICS_CSV, Customer, chat_rows


def etag_of(data: bytes) -> str:
    return f'"sha256-{hashlib.sha256(data).hexdigest()}"'


def test_a_download_says_what_it_is(customer: Customer) -> None:
    data = chat_rows(20)
    path = f"/files/{customer.upload(data, 'träin.jsonl').json()['id']}/content"
    reply = customer.http.get(path, headers={"Accept": "application/binary"})
    assert (reply.status_code, reply.content) == (200, data)
    digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
    expected = {
        "etag": etag_of(data),
        "accept-ranges": "bytes",
        "content-length": str(len(data)),
        "repr-digest": f"sha-256=:{digest}:",
        "content-disposition": "attachment; filename=\"tr_in.jsonl\"; filename*=UTF-8''tr%C3%A4in.jsonl",
        "cache-control": "no-store",
        "x-content-type-options": "nosniff",
    }
    assert {name: reply.headers[name] for name in expected} == expected
    head = customer.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert {name: head.headers[name] for name in expected} == expected


def test_parts_join_to_the_whole(customer: Customer) -> None:
    data = chat_rows(20)
    path = f"/files/{customer.file_id(data)}/content"
    third = len(data) // 3
    ranges = (f"bytes=0-{third - 1}", f"bytes={third}-{2 * third - 1}", f"bytes={2 * third}-")
    parts = [customer.http.get(path, headers={"Range": span, "If-Range": etag_of(data)}) for span in ranges]
    assert [part.status_code for part in parts] == [206, 206, 206]
    assert parts[0].headers["content-range"] == f"bytes 0-{third - 1}/{len(data)}"
    assert b"".join(part.content for part in parts) == data


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Range": "bytes=0-0,2-3"}, 200),
        ({"Range": "bytes=5-1"}, 200),
        ({"Range": "lines=1"}, 200),
        ({"Range": "bytes=-"}, 200),
        ({"Range": "bytes=0-4", "If-Range": '"other"'}, 200),
        ({"Range": "bytes=0-4", "If-Range": "Wed, 21 Oct 2015 07:28:00 GMT"}, 200),
        ({"Range": "bytes=0-4"}, 206),
        ({"Range": "bytes=-4"}, 206),
        ({"If-None-Match": '"other"'}, 200),
        ({"If-None-Match": "*"}, 304),
    ],
    ids=str,
)
def test_conditions_and_ranges(customer: Customer, headers: dict[str, str], status: int) -> None:
    reply = customer.http.get(f"/files/{customer.file_id()}/content", headers=headers)
    assert reply.status_code == status


def test_a_known_etag_costs_nothing(customer: Customer) -> None:
    data = chat_rows(10)
    path = f"/files/{customer.file_id(data)}/content"
    reply = customer.http.get(path, headers={"If-None-Match": f'"x", {etag_of(data)}'})
    assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", etag_of(data))


@pytest.mark.parametrize("span", ["bytes=999999999999-", "bytes=-0", f"bytes={'9' * 5000}-"])
def test_a_range_outside_of_the_file_is_refused(customer: Customer, span: str) -> None:
    data = chat_rows(10)
    reply = customer.http.get(f"/files/{customer.file_id(data)}/content", headers={"Range": span})
    check_envelope(reply, 416, "range_not_satisfiable")
    assert reply.headers["content-range"] == f"bytes */{len(data)}"


@pytest.mark.parametrize(
    ("value", "size_bytes", "span"),
    [
        ("bytes=0-0", 10, Span(0, 1)),
        ("bytes=0-99", 10, Span(0, 10)),
        ("bytes=9-", 10, Span(9, 10)),
        ("bytes=-99", 10, Span(0, 10)),
        ("bytes=3-2", 10, None),
        (None, 10, None),
    ],
)
def test_parse_range(value: str | None, size_bytes: int, span: Span | None) -> None:
    assert parse_range(value, size_bytes) == span


def test_no_range_of_nothing_is_satisfiable() -> None:
    with pytest.raises(ProtocolError):
        parse_range("bytes=0-0", 0)


def finished_job(customer: Customer) -> str:
    job = customer.job()
    customer.succeed(job)
    return job.id


def test_a_results_csv_is_base64_unless_csv_is_asked_for(customer: Customer) -> None:
    file_id = customer.http.get(f"/fine_tuning/jobs/{finished_job(customer)}").json()["result_files"][0]
    packed = customer.http.get(f"/files/{file_id}/content")
    assert base64.b64decode(packed.text) == METRICS_CSV
    assert packed.headers["etag"] == etag_of(packed.content)
    plain = customer.http.get(f"/files/{file_id}/content", params={"format": "csv"})
    assert plain.content == METRICS_CSV
    assert plain.headers["content-type"].startswith("text/csv")
    check_envelope(customer.http.get(f"/files/{file_id}/content?format=xml"), 400, "invalid_value", "format")


def test_every_artifact_is_the_same_bytes_by_both_ways(customer: Customer) -> None:
    job_id = finished_job(customer)
    listed = customer.http.get(f"/fine_tuning/jobs/{job_id}/artifacts").json()["data"]
    assert {item["form"] for item in listed} == {"adapter", "adapter_stock", "mask", "reports"}
    for item in listed:
        by_form = customer.http.get(f"/fine_tuning/jobs/{job_id}/artifacts/{item['form']}")
        assert by_form.content == customer.sdk.files.content(item["file_id"]).content
        assert by_form.headers["content-type"] == "application/zip"
        assert by_form.headers["etag"] == item["etag"] == etag_of(by_form.content)
        assert (item["bytes"], item["ready"]) == (len(by_form.content), True)
        head = customer.http.head(f"/fine_tuning/jobs/{job_id}/artifacts/{item['form']}")
        assert head.headers["content-length"] == str(item["bytes"])
    required = {item["form"]: item["base_required"] for item in listed}
    assert required["adapter"] == "tiny"
    assert required["mask"] is None


def test_weights_of_a_failed_gate_are_held_back_and_reports_are_not(customer: Customer) -> None:
    job = customer.job()
    customer.fail_gate(job)
    seen = customer.sdk.fine_tuning.jobs.retrieve(job.id)
    assert (seen.status, seen.fine_tuned_model) == ("failed", None)
    assert seen.error is not None
    assert (seen.error.code, seen.error.param) == ("safety_gate_failed", "safety.gate.max_harmful_score")
    listed = customer.http.get(f"/fine_tuning/jobs/{job.id}/artifacts").json()["data"]
    weights = {item["file_id"] for item in listed if item["quarantined"]}
    for form, is_open in (("adapter", False), ("adapter_stock", False), ("mask", True), ("reports", True)):
        reply = customer.http.get(f"/fine_tuning/jobs/{job.id}/artifacts/{form}")
        if is_open:
            assert reply.status_code == 200
        else:
            check_envelope(reply, 403, "artifact_quarantined")
    assert len(weights) == 2
    for file_id in weights:
        check_envelope(customer.http.get(f"/files/{file_id}/content"), 403, "artifact_quarantined")
    assert base64.b64decode(customer.sdk.files.content(seen.result_files[0]).text) == METRICS_CSV


def test_a_form_that_is_not_there_is_named(customer: Customer) -> None:
    queued = customer.create().json()["id"]
    prefix = f"/fine_tuning/jobs/{queued}/artifacts"
    assert customer.http.get(prefix).json()["data"] == []
    check_envelope(customer.http.get(f"{prefix}/adapter"), 400, "artifact_form_unavailable", "form")
    check_envelope(customer.http.get(f"{prefix}/merged"), 400, "artifact_form_unavailable", "form")
    for form in ("metrics", "pickle", "..%2Fx"):
        check_envelope(customer.http.get(f"{prefix}/{form}"), 404, "not_found")


def test_a_missing_blob_is_our_fault_and_says_no_path(customer: Customer) -> None:
    file_id = customer.file_id()
    customer.served.blobs.delete(f"files/{customer.project.id}/{file_id}")
    reply: httpx2.Response = customer.http.get(f"/files/{file_id}/content")
    assert reply.status_code == 500
    error = reply.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("server_error", "internal_error", None)
    assert customer.project.id not in reply.text
    assert reply.headers["x-request-id"].startswith("req_")

"""Chat under an Idempotency-Key, in front of a real model server."""

import httpx2
import pytest

# the fixtures of the other half of these tests: an API before a model server
from tests.app.api.routes.test_chat import HI, data, folder, served, server, zips  # noqa: F401
from tests.app.api.test_hostile_requests import check_envelope
from tests.support.http import Customer
from tests.support.waiting import wait_until


@pytest.mark.parametrize("stream", [False, True])
def test_a_keyed_answer_is_given_again(customer: Customer, stream: bool) -> None:
    """S3: chat honours Idempotency-Key; a sampled answer would differ if it were made anew."""

    def keyed(key: str, **fields: object) -> httpx2.Response:
        body = {"model": "tiny", "messages": HI, "max_tokens": 16, "temperature": 2.0, "stream": stream, **fields}
        return customer.http.post("/chat/completions", json=body, headers={"Idempotency-Key": key})

    first, again = keyed("a"), keyed("a")
    assert (first.status_code, first.content) == (200, again.content)
    assert first.headers["content-type"] == again.headers["content-type"]
    assert "x-idempotent-replay" not in first.headers
    assert again.headers["x-idempotent-replay"] == "true"
    assert keyed("b").content != first.content
    check_envelope(keyed("a", max_tokens=8), 400, "idempotency_key_reused")
    check_envelope(keyed("x" * 256), 400, "invalid_idempotency_key")


def test_a_keyed_question_that_was_refused_may_be_asked_again(customer: Customer) -> None:
    """S3: only a whole answer is stored; what failed reserves nothing."""
    body = {"model": "tiny", "messages": HI, "max_tokens": 4}
    for model, status in (("nobody", 404), ("nobody", 404), ("tiny", 200)):
        headers = {"Idempotency-Key": "k"}
        reply = customer.http.post("/chat/completions", json={**body, "model": model}, headers=headers)
        assert reply.status_code == status


def test_a_keyed_question_that_is_being_answered_is_not_asked_twice(customer: Customer) -> None:
    """S3: a repeat that comes while a stream is still running is told to come back."""
    body = {"model": "tiny", "messages": HI, "max_tokens": 400, "stream": True, "temperature": 0}
    headers = {"Idempotency-Key": "k"}
    with customer.http.stream("POST", "/chat/completions", json=body, headers=headers) as running:
        assert running.status_code == 200
        reply = customer.http.post("/chat/completions", json=body, headers=headers)
        assert check_envelope(reply, 409, "request_in_progress")
        assert reply.headers["retry-after"] == "1"
    # its client left before the end: what was not given whole is asked anew
    short = {**body, "max_tokens": 4}
    wait_until(
        lambda: customer.http.post("/chat/completions", json=short, headers=headers).status_code == 200, seconds=20
    )

"""Bodies are read for whom we know, and what they hold is given back as soon as they are parsed."""

import inspect
from collections.abc import Iterator

import httpx2
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from app.api.http.json_bodies import body_of
from app.api.schemas.chat import ChatCompletionBody
from app.main import ROUTERS
from tests.app.api.test_hostile_requests import check_envelope
from tests.support.http import Customer, Served

CALLER, BODY = "caller_with.<locals>.check", "body_of.<locals>.read"


def asked_for(dependant: Dependant) -> Iterator[str]:
    """What a handler depends on, in the order in which it is found."""
    for part in dependant.dependencies:
        yield from asked_for(part)
        yield getattr(part.call, "__qualname__", "")


def test_no_route_reads_a_body_before_it_knows_the_caller() -> None:
    """Review: cancel read and parsed the body of whoever came, under a share of memory that all such had together."""
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    orders = {route.path: list(asked_for(route.dependant)) for route in routes}
    readers = {path: order for path, order in orders.items() if BODY in order}
    assert "/v1/fine_tuning/jobs/{job_id}/cancel" in readers
    assert [path for path, order in readers.items() if CALLER not in order[: order.index(BODY)]] == []


def test_a_stranger_is_refused_whatever_it_sends(served: Served) -> None:
    """Review: the same over HTTP; a body that could not even be parsed used to be answered 400."""
    for path in ("/fine_tuning/jobs", "/fine_tuning/jobs/ftjob-x/cancel", "/chat/completions"):
        headers = {"Authorization": "Bearer sk-proj-nobody", "Content-Type": "application/json"}
        reply = httpx2.post(f"{served.url}/v1{path}", content=b"[" * 10_000, headers=headers, verify=False)
        check_envelope(reply, 401, "invalid_api_key")


def test_a_body_without_a_length_is_taken(customer: Customer) -> None:
    """Review: it counts as the largest there may be, but only until it is parsed."""

    def pieces() -> Iterator[bytes]:
        yield b'{"model":"nobody","messages":[{"role":"user","content":"'
        yield b"x" * 100_000 + b'"}]}'

    kind = {"Content-Type": "application/json"}
    reply = customer.http.post("/chat/completions", content=pieces(), headers=kind)
    check_envelope(reply, 404, "model_not_found", "model")
    assert not inspect.isasyncgenfunction(body_of(ChatCompletionBody))  # nothing of it outlives the parsing

"""What a chat reserves of its project's tokens, and what is computed for it."""

import asyncio
from typing import cast

from fastapi import Request, Response

from app.api.gateway.client import Question
from app.api.http.idempotency import answer_once
from app.api.http.resources import Resources
from app.api.routes.chat import TokenCount
from app.core.projects import Caller


def test_no_more_is_reserved_than_the_base_can_answer() -> None:
    """Review: a client that allows an answer a million tokens took all of the project's for a minute."""
    body = {"messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 1_000_000, "n": 2}
    assert TokenCount(Question("s", "m", body), 512, 2048).reserved == 100 + 2 * 2048
    assert TokenCount(Question("s", "m", {**body, "max_tokens": 10}), 512, 2048).reserved == 100 + 2 * 10
    assert TokenCount(Question("s", "m", {"messages": [], "n": 1}), 512, 2048).reserved == 512


def test_what_a_chat_means_is_not_computed_without_a_key() -> None:
    """Review: 4 MiB of messages were turned into JSON on the event loop, and thrown away."""

    def meaning() -> object:
        raise AssertionError("nobody needs it")

    async def answer() -> Response:
        return Response("soup")

    request = Request({"type": "http", "headers": []})
    nobody, nothing = cast(Caller, None), cast(Resources, None)  # neither is looked at
    reply = asyncio.run(answer_once(request, nobody, nothing, answer, meaning=meaning))
    assert reply.body == b"soup"

"""POST /v1/chat/completions: who may ask which model, then whole answers and streams from the gateway.

Whatever can be refused is refused before the first byte; a client that leaves stops its answer.
"""

import asyncio
from collections.abc import Coroutine
from contextlib import ExitStack
from functools import partial
from typing import Annotated, cast

from anyio import fail_after
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Message, Receive, Scope, Send

from app.api.gateway.client import Question
from app.api.gateway.stream import AnswerStream, Json
from app.api.http.auth import ModelsUser
from app.api.http.idempotency import answer_once
from app.api.http.json_bodies import body_of
from app.api.http.path_params import MAX_MODEL_CHARS
from app.api.http.rates import rate_headers
from app.api.http.resources import Resources, ResourcesDep
from app.api.schemas.chat import ChatCompletionBody, to_model_server
from app.core import models
from app.core.errors import RateLimited, model_not_found
from app.core.models import Target
from app.core.projects import Caller

router = APIRouter(prefix="/v1/chat")

BLOCKED_WRITE_SECONDS = 60.0


@router.post("/completions")
async def create_chat_completion(
    request: Request,
    caller: ModelsUser,
    resources: ResourcesDep,
    body: Annotated[ChatCompletionBody, Depends(body_of(ChatCompletionBody))],
) -> Response:
    """Answer a conversation."""
    answer = partial(_answer, request, caller, resources, body)
    return await answer_once(request, caller, resources, answer, meaning=partial(body.model_dump, mode="json"))


async def _answer(request: Request, caller: Caller, resources: Resources, body: ChatCompletionBody) -> Response:
    target = await run_in_threadpool(_resolve, resources, caller.project_id, body.model)
    question = Question(target.served, target.model, to_model_server(body, target.served, caller.project_id))
    with ExitStack() as held:
        held.enter_context(resources.rates.chat(caller.project_id))
        asked = TokenCount(question, resources.settings.serving.new_tokens, target.context)
        _take_tokens(request, resources, caller.project_id, asked)
        held.callback(lambda: resources.rates.tokens.change(caller.project_id, asked.unused()))
        if body.stream:
            return EventStream(await resources.gateway.open_stream(question), asked, held.pop_all())
        return await _unless_gone(request, resources.gateway.answer(question), asked)


class TokenCount:
    """The tokens of one answer: as many as it may have until it ends, then as many as it had, none if it never began.

    A guess on the prompt's side, four bytes a token: only the model server knows its tokeniser. No answer is longer
    than the `context` of the base, whatever a client allows it.
    """

    def __init__(self, question: Question, default: int, context: int) -> None:
        body = question.body
        text = sum(len(str(message.get("content", ""))) for message in cast(list[Json], body.get("messages") or []))
        most = min(cast(int, body.get("max_tokens") or default), context)
        self.prompt, self.used = text // 4, 0
        self.reserved = self.prompt + most * cast(int, body.get("n") or 1)

    def unused(self) -> int:
        """Minus what was reserved and not used."""
        return min(0, self.used - self.reserved)


def _take_tokens(request: Request, resources: Resources, project_id: str, asked: TokenCount) -> None:
    standing = resources.rates.tokens.take(project_id, asked.reserved)
    request.state.rates |= rate_headers("tokens", standing)
    if standing.wait_seconds:
        message = f"More than {standing.limit} tokens a minute. Ask for fewer, or less often."
        raise RateLimited(message, standing.wait_seconds, of="tokens")


class EventStream(StreamingResponse):
    """Server-sent events that close their source however they end; a client that stops reading is cut off."""

    def __init__(self, stream: AnswerStream, asked: TokenCount, held: ExitStack) -> None:
        super().__init__(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._stream, self._asked, self._held = stream, asked, held
        asked.used = asked.prompt

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Raises TimeoutError when one write is blocked for too long."""

        async def send_soon(message: Message) -> None:
            self._asked.used += message["type"] == "http.response.body"  # an event brings about one token
            with fail_after(BLOCKED_WRITE_SECONDS):
                await send(message)

        try:
            await super().__call__(scope, receive, send_soon)
        finally:
            self._stream.close()
            self._held.close()


def _resolve(resources: Resources, project_id: str, name: str) -> Target:
    if len(name) > MAX_MODEL_CHARS or not name.isprintable():
        raise model_not_found("".join(character for character in name[:MAX_MODEL_CHARS] if character.isprintable()))
    with resources.database.reading() as session:
        return models.resolve(session, project_id, name)


async def _unless_gone(request: Request, answer: Coroutine[None, None, Json], asked: TokenCount) -> Response:
    """The answer as JSON; when the client leaves first, it is given up."""
    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            return Response(status_code=499)  # for the access log: nobody reads it
        whole = answering.result()
        usage = whole.get("usage")
        asked.used = int(usage.get("total_tokens") or 0) if isinstance(usage, dict) else asked.reserved
        return JSONResponse(whole)
    finally:
        answering.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

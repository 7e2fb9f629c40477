"""POST /v1/chat/completions: who may ask which model, then whole answers and streams from the gateway.

Whatever can be refused is refused before the first byte; a client that leaves stops its answer.
"""

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Annotated

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
from app.api.http.resources import Resources, ResourcesDep
from app.api.schemas.chat import ChatCompletionBody, to_model_server
from app.core import models
from app.core.errors import model_not_found
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
    return await answer_once(request, caller, resources, answer, meaning=body.model_dump(mode="json"))


async def _answer(request: Request, caller: Caller, resources: Resources, body: ChatCompletionBody) -> Response:
    target = await run_in_threadpool(_resolve, resources, caller.project_id, body.model)
    question = Question(target.served, target.model, to_model_server(body, target.served, caller.project_id))
    if body.stream:
        return EventStream(await resources.gateway.open_stream(question))
    return await _unless_gone(request, resources.gateway.answer(question))


class EventStream(StreamingResponse):
    """Server-sent events that close their source however they end; a client that stops reading is cut off."""

    def __init__(self, stream: AnswerStream) -> None:
        super().__init__(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Raises TimeoutError when one write is blocked for too long."""

        async def send_soon(message: Message) -> None:
            with fail_after(BLOCKED_WRITE_SECONDS):
                await send(message)

        try:
            await super().__call__(scope, receive, send_soon)
        finally:
            self._stream.close()


def _resolve(resources: Resources, project_id: str, name: str) -> Target:
    if len(name) > MAX_MODEL_CHARS or not name.isprintable():
        raise model_not_found("".join(character for character in name[:MAX_MODEL_CHARS] if character.isprintable()))
    with resources.database.reading() as session:
        return models.resolve(session, project_id, name)


async def _unless_gone(request: Request, answer: Coroutine[None, None, Json]) -> Response:
    """The answer as JSON; when the client leaves first, it is given up."""
    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            return Response(status_code=499)  # for the access log: nobody reads it
        return JSONResponse(answering.result())
    finally:
        answering.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""The model server: its HTTP routes over one engine, and how its process starts and ends.

Only the gateway calls it, and says so by a secret that both have: whoever may ask here may ask the unaligned base. It
knows no projects, so that it believes whose turn the gateway says it is.
"""

import argparse
import asyncio
import hmac
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
import torch
import uvicorn
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from app.core.kept_secrets import model_server_secret
from app.core.models import PUBLIC_BASE, base_id_of
from app.core.settings import ServingSettings, Settings, load_settings
from app.core.storage.blobs import open_blobs
from app.core.telemetry import configure_logging
from finetuning.bases.fetch import fetch
from finetuning.model.base import FrozenBase, load_base
from finetuning.model.digest import BaseFiles, base_files
from worker.processes import exit_at_end_of_input
from worker.serving import completions, protocol
from worker.serving.adapter_cache import AdapterCache, BadAdapter, UnknownAdapter
from worker.serving.completions import Answer, AnswerLost, Refused
from worker.serving.engine import AdapterDoesNotFit, Engine, EngineFull, EngineLimits, ServedAdapter

_log = structlog.get_logger(__name__)
_PULLS_AT_ONCE = 16


@dataclass(frozen=True)
class Served:
    """A loaded base with its started engine; `secret` is the gateway's."""

    base: FrozenBase
    engine: Engine
    cache: AdapterCache
    limits: ServingSettings
    secret: str


def build_app(served: Served) -> FastAPI:
    """The routes over a started engine."""
    engine = served.engine
    app = FastAPI(openapi_url=None)
    app.add_middleware(_GatewayOnly, secret=served.secret)
    pulls = _Pulls(engine, served.cache)
    # one at a time: a tokenizer is no more thread-safe than that, and prompts are bounded
    tokenising = CapacityLimiter(1)

    @app.get("/health")
    def health() -> dict[str, object]:
        return {"status": "ok", "open": engine.open_asks}

    @app.get("/v1/models")
    def models() -> dict[str, object]:
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "system"} for name in engine.attached]
        return {"object": "list", "data": listed}

    @app.post("/v1/chat/completions")
    async def chat(body: protocol.CompletionBody, request: Request) -> Response:
        if not engine.has_room(body.user):
            raise Refused(503, protocol.FULL)
        read = partial(completions.read_prompt, served.base, body, cached_tokens=served.limits.cached_tokens)
        prompt = await to_thread.run_sync(read, limiter=tokenising)
        adapter = await pulls.adapter(body.model)
        new_tokens = served.limits.new_tokens
        answer = completions.prepare(served.base, body, prompt, adapter=adapter, default_new_tokens=new_tokens)
        if body.stream:
            return StreamingResponse(completions.stream(engine, answer), media_type="text/event-stream")
        return await _whole(engine, answer, request)

    _install_handlers(app)
    return app


def _install_handlers(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    def refused(_request: Request, error: Refused) -> JSONResponse:
        headers = {"Retry-After": "2"} if error.status == 503 else None
        return JSONResponse(error.body, status_code=error.status, headers=headers)

    @app.exception_handler(RequestValidationError)
    def malformed(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(
            protocol.error_json(f"{param}: {first['msg']}.", "invalid_value", param=param), status_code=400
        )


class _GatewayOnly:
    """Turns everybody away who has not the gateway's secret; /health says nothing worth one."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app = app
        self._expected = f"Bearer {secret}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            said = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(said, self._expected):
                await JSONResponse(protocol.NOT_THE_GATEWAY, status_code=401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Pulls:
    """Adapters being pulled: those who ask for one wait for the same pull, and a slow one holds up nobody else."""

    def __init__(self, engine: Engine, cache: AdapterCache) -> None:
        self._engine = engine
        self._cache = cache
        self._threads = CapacityLimiter(_PULLS_AT_ONCE)
        self._under_way: dict[str, asyncio.Task[ServedAdapter | None]] = {}

    async def adapter(self, name: str) -> ServedAdapter | None:
        """The adapter of that served name, in memory. Raises Refused."""
        pull = self._under_way.get(name)
        if pull is None:
            pull = self._under_way[name] = asyncio.create_task(self._pull(name))
            pull.add_done_callback(lambda _: self._under_way.pop(name))
        return await asyncio.shield(pull)  # whoever leaves does not end it for the others

    async def _pull(self, name: str) -> ServedAdapter | None:
        if name == PUBLIC_BASE:
            return None
        return await _adapter(self._engine, lambda: self._cache.pull(name), name, self._threads)


async def _adapter(
    engine: Engine, pull: Callable[[], ServedAdapter | None], name: str, threads: CapacityLimiter
) -> ServedAdapter | None:
    try:
        adapter = await to_thread.run_sync(pull, limiter=threads)
        if adapter is not None:
            await asyncio.wrap_future(engine.attach(adapter))
    except UnknownAdapter:
        raise Refused(404, protocol.error_json("There is no such adapter.", "model_not_found", param="model")) from None
    except (BadAdapter, AdapterDoesNotFit):
        _log.exception("adapter.unusable", name=name)
        message = "The model's adapter cannot be loaded; the operator's log says why."
        raise Refused(500, protocol.error_json(message, "internal_error", kind="server_error")) from None
    return adapter


async def _whole(engine: Engine, answer: Answer, request: Request) -> Response:
    """The answer as one JSON body; a client that leaves stops it."""
    collecting = asyncio.ensure_future(completions.collect(engine, answer))
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # nobody is there to read it
        return JSONResponse(collecting.result())
    except AnswerLost:
        return JSONResponse(protocol.LOST, status_code=500)
    except EngineFull:
        raise Refused(503, protocol.FULL) from None
    finally:
        collecting.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def main(argv: list[str]) -> int:
    """Load the base, then listen for the gateway. Ends with its parent, or on SIGTERM."""
    parser = argparse.ArgumentParser(prog="worker.serving.server")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--base", type=Path, help="folder of the public base; default: the configured base's")
    arguments = parser.parse_args(argv)
    exit_at_end_of_input(0)
    settings = load_settings()
    configure_logging("model server", settings.log_level)
    torch.set_num_threads(settings.serving.threads)
    folder = arguments.base or _configured_base(settings)
    base = load_base(folder)
    engine = Engine(base, engine_limits(settings.serving))
    engine.start()
    _log.info("model_server.loaded", port=arguments.port)
    secret = model_server_secret(settings)
    app = build_app(Served(base, engine, _cache(settings, base_files(folder)), settings.serving, secret))
    uvicorn.run(
        app, host=arguments.host, port=arguments.port, log_config=None, access_log=False, timeout_graceful_shutdown=3
    )
    engine.close()
    return 0


def engine_limits(serving: ServingSettings) -> EngineLimits:
    """The engine's bounds from the settings."""
    return EngineLimits(
        rows=serving.rows, cached_tokens=serving.cached_tokens, waiting=serving.waiting, adapters=serving.adapters
    )


def _cache(settings: Settings, base: BaseFiles) -> AdapterCache:
    folder = settings.data / "adapters"
    return AdapterCache(open_blobs(settings), folder, limit_bytes=settings.serving.adapter_cache_bytes, base=base)


def _configured_base(settings: Settings) -> Path:
    return fetch(settings.base, settings.data / "bases" / base_id_of(settings.base), say=_say)


def _say(line: str) -> None:
    _log.info("base.fetching", detail=line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

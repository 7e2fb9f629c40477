"""The model server: its HTTP routes over one engine, and how its process starts and ends.

Only the gateway calls it. It trusts its callers (no projects, no keys), so it listens on loopback by default.
"""

import argparse
import asyncio
import sys
from pathlib import Path

import structlog
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from app.core.models import base_id_of
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


def build_app(base: FrozenBase, engine: Engine, cache: AdapterCache, *, new_tokens: int) -> FastAPI:
    """The routes over a started engine."""
    app = FastAPI(openapi_url=None)

    @app.get("/health")
    def health() -> dict[str, object]:
        return {"status": "ok", "open": engine.open_asks}

    @app.get("/v1/models")
    def models() -> dict[str, object]:
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "system"} for name in engine.attached]
        return {"object": "list", "data": listed}

    @app.post("/v1/chat/completions")
    async def chat(body: protocol.CompletionBody, request: Request) -> Response:
        adapter = await _adapter(engine, cache, body.model)
        answer = completions.prepare(base, body, adapter, default_new_tokens=new_tokens)
        if not engine.has_room:
            raise Refused(503, protocol.FULL)
        if body.stream:
            return StreamingResponse(completions.stream(engine, answer), media_type="text/event-stream")
        return await _whole(engine, answer, request)

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

    return app


async def _adapter(engine: Engine, cache: AdapterCache, name: str) -> ServedAdapter | None:
    try:
        adapter = await run_in_threadpool(cache.pull, name)
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
    """Load the base, then listen: whoever can connect gets answers. Ends with its parent, or on SIGTERM."""
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
    app = build_app(base, engine, _cache(settings, base_files(folder)), new_tokens=settings.serving.new_tokens)
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

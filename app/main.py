"""The API process: builds the app from settings and holds its resources open while it serves.

The schema must be there already: one runner migrates before any API starts.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import structlog
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI
from prometheus_client import start_http_server

from app.api.gateway.client import Gateway
from app.api.http import exception_handlers
from app.api.http.middleware import RequestGuard, RequestLog
from app.api.http.rates import Rates
from app.api.http.resources import Resources
from app.api.http.shares import Shares, Turn
from app.api.routes import chat, files, health, jobs, models, results
from app.core import deployment, projects
from app.core.broker import Waker, make_celery
from app.core.errors import StartRefused
from app.core.jobs.reaper import Reaper
from app.core.kept_secrets import model_server_secret
from app.core.models import ensure_base
from app.core.settings import EdgeSettings, Settings
from app.core.storage.blobs import open_blobs
from app.core.storage.database import open_database
from app.core.telemetry import configure_logging

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

ROUTERS = (files.router, results.router, jobs.router, models.router, chat.router, health.router)
# the interpreter runs one at a time anyway, and each more is one more that the event loop waits for
_COMPUTING_AT_ONCE = 1


def build_app(settings: Settings) -> FastAPI:
    """The whole API as one ASGI app; resources open when it starts, not here."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        configure_logging("api", settings.log_level)
        async with AsyncExitStack() as stack:
            try:
                app.state.resources = resources = await to_thread.run_sync(_open_resources, settings, stack)
            except StartRefused as error:
                log.critical("start.refused", reason=str(error))
                raise
            stack.push_async_callback(resources.gateway.close)
            reaper = Reaper(resources.database, resources.celery, resources.blobs, settings)
            reaper.start()
            stack.callback(reaper.stop)
            _serve_metrics(settings.edge, stack)
            yield

    # no schema pages: clients know the API from the OpenAI SDK, and a redirect would make them loop
    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    for router in ROUTERS:
        app.include_router(router)
    exception_handlers.install(app, ROUTERS)
    app.add_middleware(RequestGuard, settings=settings)
    app.add_middleware(RequestLog)
    return app


def _serve_metrics(edge: EdgeSettings, stack: AsyncExitStack) -> None:
    """Serve the counters of this process where the operator says, apart from what clients reach."""
    if edge.metrics_port is None:
        return
    server, _ = start_http_server(edge.metrics_port, addr=edge.metrics_host)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)


def _open_resources(settings: Settings, stack: AsyncExitStack) -> Resources:
    database = open_database(settings)
    stack.callback(database.close)
    celery = make_celery(settings)
    stack.callback(celery.close)
    blobs = open_blobs(settings)
    deployment.bind(database, blobs, settings)
    pepper = projects.load_pepper(settings)
    with database.writing() as session:
        wakes = ensure_base(session, settings)
        projects.bind_pepper(session, settings, pepper)
        projects.bootstrap(session, settings, pepper)
        deployment.serve_queue(session, settings)
        session.commit()
    waker = Waker(celery)
    waker.start()
    stack.callback(waker.stop)
    waker.soon(*wakes)
    gateway = Gateway(
        settings.model_server_urls,
        secret=model_server_secret(settings),
        chat_seconds=settings.serving.chat_seconds,
        ping_seconds=settings.serving.ping_seconds,
    )
    edge = settings.edge
    return Resources(
        settings,
        database,
        blobs,
        celery,
        pepper,
        gateway,
        waker,
        upload_threads=CapacityLimiter(edge.uploads),
        uploads=Shares(edge.uploads, edge.uploads_per_project),
        body_bytes=Shares(edge.body_bytes, edge.body_bytes // 4),
        computing=CapacityLimiter(_COMPUTING_AT_ONCE),
        turn=Turn(),
        rates=Rates(edge),
    )

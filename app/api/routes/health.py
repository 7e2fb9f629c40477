"""Is this process alive, and can it serve. These routes ask for no key, so they say nothing about tenants."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from app.api.http.resources import ResourcesDep
from app.core.storage.database import read_clock

router = APIRouter()


@router.api_route("/healthz", methods=["GET", "HEAD"])
async def is_alive() -> Response:
    """The process answers: by its event loop alone, since requests that wait may hold every thread."""
    return JSONResponse({"status": "ok"})


@router.api_route("/readyz", methods=["GET", "HEAD"])
def is_ready(resources: ResourcesDep) -> Response:
    """The database answers; without it every route would be a 503."""
    with resources.database.reading() as session:
        read_clock(session)
    return JSONResponse({"status": "ok"})

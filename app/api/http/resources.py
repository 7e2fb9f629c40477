"""What the API opened at start, handed to every handler."""

from dataclasses import dataclass
from typing import Annotated

from anyio import CapacityLimiter
from celery import Celery
from fastapi import Depends, Request

from app.api.gateway.client import Gateway
from app.api.http.rates import Rates
from app.api.http.shares import Shares, Turn
from app.core.broker import Waker
from app.core.settings import Settings
from app.core.storage.blobs import BlobStore
from app.core.storage.database import Database


@dataclass(frozen=True)
class Resources:
    """Settings and open resources; `pepper` hashes API keys.

    The rest is what requests share. `computing`: threads that parse a large body, few, since they take the interpreter
    from each other and from the event loop; `turn` is the same for threads that check a file or make a long list.
    `uploads`: places, each with a thread of `upload_threads`; `body_bytes`: memory for JSON bodies.
    """

    settings: Settings
    database: Database
    blobs: BlobStore
    celery: Celery
    pepper: bytes
    gateway: Gateway
    waker: Waker
    upload_threads: CapacityLimiter
    uploads: Shares
    body_bytes: Shares
    computing: CapacityLimiter
    turn: Turn
    rates: Rates


def get_resources(request: Request) -> Resources:
    """The resources of the app that serves this request."""
    resources = request.app.state.resources
    assert isinstance(resources, Resources)
    return resources


ResourcesDep = Annotated[Resources, Depends(get_resources)]

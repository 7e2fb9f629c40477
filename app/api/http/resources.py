"""What the API opened at start, handed to every handler."""

from dataclasses import dataclass
from typing import Annotated

from anyio import CapacityLimiter
from celery import Celery
from fastapi import Depends, Request

from app.api.gateway.client import Gateway
from app.core.broker import Waker
from app.core.settings import Settings
from app.core.storage.blobs import BlobStore
from app.core.storage.database import Database


@dataclass(frozen=True)
class Resources:
    """Settings and open resources; `pepper` hashes API keys, `upload_threads` bounds uploads in progress."""

    settings: Settings
    database: Database
    blobs: BlobStore
    celery: Celery
    pepper: bytes
    upload_threads: CapacityLimiter
    gateway: Gateway
    waker: Waker


def get_resources(request: Request) -> Resources:
    """The resources of the app that serves this request."""
    resources = request.app.state.resources
    assert isinstance(resources, Resources)
    return resources


ResourcesDep = Annotated[Resources, Depends(get_resources)]

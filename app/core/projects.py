"""Orgs, projects and API keys.

Knows how keys are made, stored (keyed BLAKE2b and a 6-character hint) and found; must not know HTTP headers.
"""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.core.settings import Settings
from app.core.tables import Org, Project

SCOPES = ("files:r", "files:w", "jobs:r", "jobs:w", "models:infer", "models:w", "artifacts:r", "safety:r")


@dataclass(frozen=True)
class KeyHolder:
    """Whom a valid key belongs to."""

    key_id: str
    project: Project
    org: Org
    scopes: frozenset[str]


@dataclass(frozen=True)
class BootstrapKeys:
    """The plain keys of the two projects of the embedded service; never logged."""

    default: str
    baseline: str


def load_pepper(settings: Settings) -> bytes:
    """The server's secret for hashing keys: <data>/keys/pepper, made with mode 600 when absent."""
    raise NotImplementedError


def authenticate(session: Session, pepper: bytes, secret: str) -> KeyHolder:
    """Who holds this key. Raises InvalidApiKey."""
    raise NotImplementedError


def bootstrap(session: Session, settings: Settings, pepper: bytes) -> BootstrapKeys:
    """Make the projects `default` (policy immunotune) and `baseline` (policy plain) with a key each. Safe to repeat.

    The default key is `settings.api_key`; keys not given are generated once and kept under <data>/keys, mode 600.
    """
    raise NotImplementedError

"""The programs of the service: their command lines, environments, and what must be there before they start.

Knows which verb of this package runs which program; must not know how processes are watched (launcher.py).
"""

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

from app.core import models, projects
from app.core.broker import CHECKS_QUEUE, CPU_QUEUE
from app.core.projects import BootstrapKeys
from app.core.settings import Settings, to_environment
from app.core.storage.database import migrate, open_database
from app.core.storage.tables import BaseStatus
from embedded.children import Part
from finetuning.bases.fetch import is_here

# A worker may hand its job back first: save, release, wake another worker.
WORKER_GRACE_SECONDS = 60.0


def choose_ports(settings: Settings) -> Settings:
    """Replace port 0 by a free port, and give the embedded model server one. Raises OSError when a port is taken."""
    port = settings.port or _free_port(settings.host)
    _free_port(settings.host, port)
    model_server = f"http://127.0.0.1:{_free_port('127.0.0.1')}"
    return settings.model_copy(update={"port": port, "model_server_urls": (model_server,)})


def base_folder(settings: Settings) -> Path:
    """Where the configured base lies, or will lie once it is fetched."""
    return settings.data / "bases" / models.base_id_of(settings.base)


def fetching(settings: Settings) -> Part | None:
    """The program that fetches the base, or None when it is here. Raises FetchFailed when another base lies there."""
    if is_here(settings.base, base_folder(settings)):
        return None
    part = _part(settings, "base", _verb("base", settings.base))
    environment = {name: value for name, value in part.env.items() if name != "HF_HUB_OFFLINE"}
    return replace(part, env=environment)


def is_base_aligned(settings: Settings) -> bool:
    """Whether the configured base can answer already, or will be aligned first. Call after the API is up."""
    database = open_database(settings)
    try:
        with database.reading() as session:
            return models.get_base(session, models.base_id_of(settings.base)).status == BaseStatus.READY
    finally:
        database.close()


def prepare_database(settings: Settings) -> BootstrapKeys:
    """Migrate, and make the two projects with their keys."""
    migrate(settings)
    database = open_database(settings)
    try:
        with database.writing() as session:
            keys = projects.bootstrap(session, settings, projects.load_pepper(settings))
            session.commit()
    finally:
        database.close()
    return keys


def programs(settings: Settings) -> list[Part]:
    """Everything but the broker, in start order."""
    model_server_port = settings.model_server_urls[0].rpartition(":")[2]
    return [
        _part(settings, "API", _verb("serve")),
        _part(settings, "checks worker", _verb("worker", "--queues", CHECKS_QUEUE)),
        _part(settings, "training worker", _verb("worker", "--queues", CPU_QUEUE), grace_seconds=WORKER_GRACE_SECONDS),
        _part(settings, "model server", _verb("models", "--port", model_server_port)),
    ]


def _part(settings: Settings, name: str, argv: list[str], *, grace_seconds: float = 5.0) -> Part:
    environment = dict(os.environ) | to_environment(settings)
    log = settings.data / "logs" / f"{name.lower().replace(' ', '-')}.log"
    return Part(name, argv, environment, log, grace_seconds)


def _verb(*words: str) -> list[str]:
    # -P: a folder that one happens to stand in may hold packages of the same names
    return [sys.executable, "-P", "-m", "embedded", *words]


def _free_port(host: str, port: int = 0) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return int(probe.getsockname()[1])

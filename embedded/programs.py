"""The programs of the service: their command lines, environments, and what must be there before they start.

Each is a verb of this package. Starting and watching them is launcher.py's work.
"""

import socket
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from app.core import deployment, models, projects
from app.core.broker import CHECKS_QUEUE
from app.core.projects import BootstrapKeys, UnknownKey
from app.core.settings import Settings, to_environment
from app.core.storage.blobs import open_blobs
from app.core.storage.database import migrate, open_database
from app.core.storage.tables import BaseStatus
from finetuning.bases.fetch import is_here
from worker.processes import Program

# A worker may hand its job back first: save, release, wake another worker.
WORKER_GRACE_SECONDS = 60.0


def choose_ports(settings: Settings) -> Settings:
    """Replace port 0 by a free port, and give the embedded model server one. Raises OSError when a port is taken."""
    port = settings.port or _free_port(settings.host)
    _free_port(settings.host, port)
    model_server = f"http://127.0.0.1:{_free_port('127.0.0.1')}"
    return settings.model_copy(update={"port": port, "model_server_urls": (model_server,)})


def with_served_base(settings: Settings) -> Settings:
    """The settings, with the base that the deployment serves where they name none: the demo may have changed it."""
    if "base" in settings.model_fields_set:
        return settings
    database = open_database(settings)
    try:
        with database.reading() as session:
            source = models.served_source(session)
    except DBAPIError:  # no tables yet, or no database: who prepares it says so
        return settings
    finally:
        database.close()
    return settings if source is None else settings.model_copy(update={"base": source})


def base_folder(settings: Settings) -> Path:
    """Where the configured base lies, or will lie once it is fetched."""
    return settings.data / "bases" / models.base_id_of(settings.base)


def base_program(settings: Settings, environment: Mapping[str, str]) -> Program | None:
    """The program that fetches the base, or None when it is here. Raises FetchFailed when another base lies there."""
    if is_here(settings.base, base_folder(settings)):
        return None
    # every other program stays off the model hub by this variable, which huggingface_hub reads
    online = {name: value for name, value in environment.items() if name != "HF_HUB_OFFLINE"}
    return _program(settings, online, "base", _verb("base", settings.base))


def is_base_aligned(settings: Settings) -> bool:
    """Whether the configured base can answer already, or will be aligned first. Call after the API is up."""
    database = open_database(settings)
    try:
        with database.reading() as session:
            return models.get_base(session, models.base_id_of(settings.base)).status == BaseStatus.READY
    finally:
        database.close()


def prepare_database(settings: Settings, *, for_demo: bool = False) -> BootstrapKeys:
    """Migrate, bind database and store to each other, and make the default project with its key.

    The demo's user has just named the base and compares with an undefended project: it alone gets both. Raises
    StartRefused.
    """
    migrate(settings)
    database = open_database(settings)
    try:
        deployment.bind(database, open_blobs(settings), settings)
        pepper = projects.load_pepper(settings)
        with database.writing() as session:
            if for_demo:
                models.retire_others(session, settings)
            models.require_base(session, settings)
            projects.bind_pepper(session, settings, pepper)
            default = projects.bootstrap(session, settings, pepper)
            baseline = projects.open_baseline(session, pepper) if for_demo else ""
            session.commit()
    finally:
        database.close()
    if default is None:
        raise UnknownKey(
            f"No valid key of the default project is kept in {settings.data / 'keys'}. Set IMMUNOTUNE_API_KEY to one, "
            "or run `immunotune rekey` for a new one; that revokes the others."
        )
    return BootstrapKeys(default, baseline)


def service_programs(settings: Settings, environment: Mapping[str, str]) -> list[Program]:
    """Everything but the broker, in start order; `environment` is what they inherit beside the settings."""
    model_server_port = settings.model_server_urls[0].rpartition(":")[2]
    training = _program(settings, environment, "training worker", _verb("worker", "--queues", settings.train_queue))
    return [
        _program(settings, environment, "API", _verb("serve")),
        _program(settings, environment, "checks worker", _verb("worker", "--queues", CHECKS_QUEUE)),
        replace(training, grace_seconds=WORKER_GRACE_SECONDS),
        _program(settings, environment, "model server", _verb("models", "--port", model_server_port)),
    ]


def _program(settings: Settings, environment: Mapping[str, str], name: str, argv: list[str]) -> Program:
    log = settings.data / "logs" / f"{name.lower().replace(' ', '-')}.log"
    return Program(name, argv, {**environment, **to_environment(settings)}, log)


def _verb(*words: str) -> list[str]:
    # -P: a folder that one happens to stand in may hold packages of the same names
    return [sys.executable, "-P", "-m", "embedded", *words]


def _free_port(host: str, port: int = 0) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return int(probe.getsockname()[1])

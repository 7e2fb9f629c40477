"""Secrets of the deployment: made once, kept under <data>/keys with mode 600, and what a job is handed of them."""

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

from app.core.settings import Settings


def job_secret(settings: Settings, job_id: str) -> str:
    """What draws of this job start from that its customer must not foretell; the same in each of its attempts.

    Made of the job's id and of IMMUNOTUNE_DRAW_SECRET, or, where that is unset, of <data>/keys/draws. Nothing can be
    said from it of another job's.
    """
    given = settings.draw_secret
    own = given.get_secret_value() if given else keep_secret(settings.data / "keys" / "draws", secrets.token_hex(32))
    return hmac.new(own.encode(), f"draws of {job_id}".encode(), hashlib.sha256).hexdigest()


def model_server_secret(settings: Settings) -> str:
    """What the gateway says to a model server: IMMUNOTUNE_MODEL_SERVER_SECRET, or, where that is unset,
    <data>/keys/models."""
    given = settings.model_server_secret
    return given.get_secret_value() if given else keep_secret(settings.data / "keys" / "models", secrets.token_hex(32))


def keep_secret(path: Path, fresh: str) -> str:
    """The secret in this file; where there is none yet, `fresh`, which stays from then on."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    incoming = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(incoming, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(fresh)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # whoever links first decides, also between processes
            os.link(incoming, path)
    finally:
        incoming.unlink(missing_ok=True)
    return path.read_text().strip()

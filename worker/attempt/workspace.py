"""The scratch folder of one attempt: inputs fetched and verified, checkpoints up- and downloaded, the log kept."""

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict, ValidationError

from app.core.errors import StorageFull
from app.core.jobs.lease import Lease, SavedCheckpoint
from app.core.kept_secrets import job_secret
from app.core.settings import Settings
from app.core.storage.blobs import (
    Blob,
    BlobMissing,
    BlobStore,
    CorruptBlob,
    fetch_file,
    put_bytes,
    put_file,
    read_bytes,
)
from finetuning.contract.order import TrainOrder, write_order
from finetuning.contract.progress import StepDone, to_line
from finetuning.model.digest import weights_digest
from worker.archive import unpack
from worker.attempt.launch import usable_cores

ROWS, VALIDATION, ALIGNMENT, CHECKPOINT, RESULT = "rows.jsonl", "validation.jsonl", "alignment", "checkpoint", "result"
OPERATOR_ROWS = "operator.jsonl"
_CONTENTS, _STEPS, _OWNER = "contents.json", "steps.jsonl", "owner.lock"
_KEPT_LOGS = 50
# Checkpoints, cached hidden states and the result together, measured on the 135M base: 180 MiB
_WORKING_BYTES = 512 * 2**20


class RottenCheckpoint(Exception):
    """The lease's checkpoint cannot be resumed from; the message is a few words for people."""


class _Contents(BaseModel):
    """The files of an uploaded folder; written after all of them, so its presence says that they are complete."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # another release may have written more

    files: tuple[Blob, ...]


@dataclass(frozen=True)
class Workspace:
    """An open scratch folder; `log` is the training process's standard error."""

    folder: Path
    log: Path
    owner: IO[bytes]
    """Locked for as long as this process lives, so that others can tell a folder in use from one that was left."""


def open_workspace(settings: Settings, store: BlobStore, lease: Lease) -> Workspace:
    """Fetch and verify an attempt's inputs and write its order.

    Raises StorageFull before anything is fetched; BlobMissing and CorruptBlob of a file; RottenCheckpoint once all else
    is there, so that it does not come from a store that is gone as a whole.
    """
    folder = settings.data / "scratch" / f"{lease.job_id}.{lease.fence}-{lease.attempt}"
    _remove_left_folders(folder.parent)
    folder.mkdir(parents=True)
    owner = _owned(folder)
    try:
        _require_room(folder, settings.limits.free_bytes, lease)
        write_order(folder, _fetch_inputs(settings, store, lease, folder))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        owner.close()
        raise
    return Workspace(folder=folder, log=folder / "train.log", owner=owner)


def drop(workspace: Workspace) -> None:
    """Remove the scratch folder and all in it."""
    shutil.rmtree(workspace.folder, ignore_errors=True)
    workspace.owner.close()


def keep_log(settings: Settings, workspace: Workspace) -> Path:
    """Move the training process's log out of the scratch folder, for the operator; the newest 50 are kept."""
    kept = settings.data / "logs" / "attempts"
    kept.mkdir(parents=True, exist_ok=True)
    target = kept / f"{workspace.folder.name}.log"
    if workspace.log.exists():
        workspace.log.replace(target)
    for old in sorted(kept.glob("*.log"), key=lambda path: path.stat().st_mtime)[:-_KEPT_LOGS]:
        old.unlink(missing_ok=True)
    return target


def write_steps(checkpoint: Path, steps: Sequence[StepDone]) -> None:
    """Keep the steps so far with a checkpoint, so that the results CSV of a resumed job is whole."""
    (checkpoint / _STEPS).write_text("".join(to_line(step) + "\n" for step in steps), encoding="utf-8")


def read_steps(workspace: Workspace) -> list[StepDone]:
    """The steps that the fetched checkpoint stands on; none without one. Raises RottenCheckpoint."""
    kept = workspace.folder / CHECKPOINT / _STEPS
    if not kept.exists():
        return []
    try:
        return [
            StepDone.model_validate_json(line, extra="ignore") for line in kept.read_text(encoding="utf-8").splitlines()
        ]
    except ValidationError as error:
        raise RottenCheckpoint("its steps cannot be read") from error


def is_full(settings: Settings, workspace: Workspace) -> bool:
    """Whether the scratch folder's disk is below its low-water mark: what a process that lacks room left behind."""
    return shutil.disk_usage(workspace.folder).free <= settings.limits.free_bytes


def upload_folder(store: BlobStore, prefix: str, folder: Path) -> Blob:
    """Store every file of a folder under `prefix`, and last the list of contents, which is returned.

    Raises BlobExists, StorageFull.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    stored = [put_file(store, f"{prefix}/{path.relative_to(folder).as_posix()}", path) for path in files]
    return put_bytes(store, f"{prefix}/{_CONTENTS}", _Contents(files=tuple(stored)).model_dump_json().encode())


def fetch_folder(store: BlobStore, prefix: str, folder: Path, *, contents_sha256: str | None = None) -> None:
    """Fetch what `upload_folder` stored and verify each file, and their list where its digest is known.

    Raises BlobMissing, CorruptBlob.
    """
    listed = read_bytes(store, f"{prefix}/{_CONTENTS}")
    if contents_sha256 not in (None, hashlib.sha256(listed).hexdigest()):
        raise CorruptBlob(f"{prefix}/{_CONTENTS}")
    try:
        contents = _Contents.model_validate_json(listed)
    except ValidationError as error:
        raise CorruptBlob(f"{prefix}/{_CONTENTS}") from error
    for blob in contents.files:
        target = folder / blob.key.removeprefix(f"{prefix}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        fetch_file(store, blob, target)


def _owned(folder: Path) -> IO[bytes]:
    """The folder's lock; it gets its name once it is held, so that nobody takes the folder for one that was left."""
    new = folder / f"{_OWNER}.new"
    owner = new.open("wb")
    fcntl.flock(owner, fcntl.LOCK_EX)
    new.rename(folder / _OWNER)
    return owner


def _fetch_checkpoint(store: BlobStore, saved: SavedCheckpoint, folder: Path) -> None:
    """Fetch the checkpoint, twice if need be: one answer that breaks off says little. Raises RottenCheckpoint."""
    for last in (False, True):
        try:
            fetch_folder(store, saved.prefix, folder, contents_sha256=saved.contents_sha256)
        except (BlobMissing, CorruptBlob) as error:
            shutil.rmtree(folder, ignore_errors=True)
            if last:
                words = "a part is missing" if isinstance(error, BlobMissing) else "it was altered"
                raise RottenCheckpoint(words) from error
        else:
            return


def _remove_left_folders(scratch: Path) -> None:
    """Remove what killed supervisors of this host left; a folder whose owner lives stays locked."""
    for owner in scratch.glob(f"*/{_OWNER}"):
        with contextlib.suppress(OSError), owner.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(owner.parent, ignore_errors=True)


def _fetch_inputs(settings: Settings, store: BlobStore, lease: Lease, folder: Path) -> TrainOrder:
    for blob, name in ((lease.training, ROWS), (lease.validation, VALIDATION)):
        if blob is not None:
            fetch_file(store, blob, folder / name)
    if settings.operator_rows is not None:
        # a copy, so that an edit during the attempt changes nothing in it
        shutil.copyfile(settings.operator_rows, folder / OPERATOR_ROWS)
    if lease.alignment is not None:
        packed = folder / "alignment.zip"
        fetch_file(store, lease.alignment, packed)
        unpack(packed, folder / ALIGNMENT)
        packed.unlink()
    base = _base(settings, lease)
    base_sha256 = weights_digest(Path(base))
    if lease.checkpoint is not None:
        _fetch_checkpoint(store, lease.checkpoint, folder / CHECKPOINT)
    return TrainOrder(
        job_id=lease.job_id,
        recipe=lease.recipe,
        base=base,
        base_sha256=base_sha256,
        rows=ROWS if lease.training else None,
        validation=VALIDATION if lease.validation else None,
        alignment=ALIGNMENT if lease.alignment else None,
        checkpoint=CHECKPOINT if lease.checkpoint else None,
        operator_rows=OPERATOR_ROWS if settings.operator_rows else None,
        judge=settings.judge,
        cache="cache",
        secret=job_secret(settings, lease.job_id),
        private=(str(settings.data), str(settings.runtime), str(settings.secrets)),
        states=str(settings.data / "states"),
        threads=usable_cores(),
        device=settings.device,
    )


def _base(settings: Settings, lease: Lease) -> str:
    fetched = settings.data / "bases" / lease.base_id
    return str(fetched) if fetched.is_dir() else lease.base_source


def _require_room(folder: Path, low_water_bytes: int, lease: Lease) -> None:
    inputs = sum(blob.size_bytes for blob in (lease.training, lease.validation, lease.alignment) if blob)
    needed = 2 * inputs + _WORKING_BYTES + low_water_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageFull(
            f"The worker's disk has {free} bytes free, an attempt needs {needed}. Free some, or move IMMUNOTUNE_DATA."
        )

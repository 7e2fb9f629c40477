"""How a training process is started on this host: its command line, environment and number of threads.

It is one process on at most one device. Tests start a stand-in by another function of `launch_command`'s type.
"""

import os
import site
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.core.broker import CHECKS_QUEUE, CPU_QUEUE
from finetuning.contract.order import ORDER_FILE, read_order
from finetuning.judging.catalogue import key_variables
from worker.processes import inherited_environment

Mode = Literal["run", "parity"]
# where our packages were imported from, a clone or site-packages: a training process runs this very code
SOURCE_ROOT = Path(__file__).resolve().parents[2]

# A driver may list a device that cannot compute.
_LOOK_FOR_A_GPU = "import torch; print(torch.ones(2, device='cuda').sum().item(), torch.cuda.get_device_name())"
_LOOK_SECONDS = 180.0
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "VIRTUAL_ENV")


@dataclass(frozen=True)
class Launch:
    """One process to spawn: its argv, its whole environment and its working folder."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    folder: Path


class WrongDevice(RuntimeError):
    """A queue's device is not there; the message says what to do."""


Launcher = Callable[[Path, Mode], Launch]


def launch_command(scratch: Path, mode: Mode) -> Launch:
    """The training process on this host, bound to `scratch`; `parity` certifies the result that lies there.

    The environment is built from an allow-list, so no credential of the worker reaches the training process but the
    keys that the order's judges name. Raises BadGuard when a guard file is gone.
    """
    flags = ("--parity",) if mode == "parity" else ()
    argv = (sys.executable, "-P", "-m", "worker.train", *flags, str(scratch))
    keys = key_variables(read_order(scratch).judge) if (scratch / ORDER_FILE).exists() else ()
    return Launch(argv=argv, env=_environment(inherited_environment(), usable_cores(), keys), folder=SOURCE_ROOT)


def device_of(queues: Sequence[str]) -> str:
    """On which device jobs of these queues train, after a look whether it answers. Raises WrongDevice.

    `train.cpu` trains on whatever there is; every other queue is a GPU's, on which a job must not train without one.
    """
    on_gpus = [queue for queue in queues if queue not in (CHECKS_QUEUE, CPU_QUEUE)]
    if not on_gpus:
        return "auto"
    argv = (sys.executable, "-P", "-c", _LOOK_FOR_A_GPU)
    environment = _environment(inherited_environment(), usable_cores())
    try:
        found = subprocess.run(
            argv, env=environment, cwd=SOURCE_ROOT, capture_output=True, text=True, timeout=_LOOK_SECONDS, check=False
        )
        reason = found.stderr.strip().splitlines()[-1:] if found.returncode else None
    except subprocess.TimeoutExpired:
        reason = [f"it did not answer within {_LOOK_SECONDS:.0f} s"]
    if reason is not None:
        raise WrongDevice(
            f"the queue {on_gpus[0]} needs a GPU, and torch cannot use one here ({' '.join(reason)}): mend the driver "
            f"or CUDA_VISIBLE_DEVICES, or serve {CPU_QUEUE}"
        )
    return "cuda"


def usable_cores() -> int:
    """The processors that this process may run on; part of a checkpoint's fingerprint."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def import_path(root: Path) -> dict[str, str]:
    """The variable with which a new process imports our packages from `root`; none where they are installed.

    On PYTHONPATH the site-packages would come before the standard library, and any package there could shadow it.
    """
    installed = {Path(folder).resolve() for folder in (*site.getsitepackages(), site.getusersitepackages())}
    return {} if root in installed else {"PYTHONPATH": str(root)}


def _environment(parent: Mapping[str, str], threads: int, keys: Sequence[str] = ()) -> dict[str, str]:
    """What the libraries of a training process read from the environment, when they are loaded, and nowhere else."""
    kept = {name: parent[name] for name in (*_KEPT, *keys) if name in parent}
    return (
        kept
        | import_path(SOURCE_ROOT)
        | {
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": str(threads),
            # Unpinned, a busy neighbour puts both threads on one core and a step takes ten times as long.
            "OMP_PROC_BIND": "true",
            "OMP_PLACES": "cores",
            "OMP_WAIT_POLICY": "passive",
            # Spin a little before sleeping: a quarter faster on two cores, and still kind to a busy neighbour.
            "GOMP_SPINCOUNT": "20000",
            # Without it cuBLAS may add up in another order the next time.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            # A training process asks no model hub.
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
    )

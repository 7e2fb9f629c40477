"""A running training process: spawn it, read what it prints, stop it and everything that it started."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from worker.attempt.launch import Launch
from worker.processes import end_group


class TrainingProcess:
    """A training process in a session of its own. We hold its standard input for as long as we live."""

    def __init__(self, launch: Launch, *, log: Path) -> None:
        """Spawn it with standard error appended to `log`. Raises OSError when it cannot be started."""
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                launch.argv,
                env=dict(launch.env),
                cwd=launch.folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id, which is also its process group."""
        return self._process.pid

    def lines(self) -> Iterator[bytes]:
        """What it prints, line by line, until it closes its standard output."""
        assert self._process.stdout is not None
        yield from self._process.stdout

    def stop(self, *, grace_seconds: float) -> int:
        """SIGTERM, and SIGKILL to the whole group after the grace; returns the exit status."""
        if grace_seconds > 0 and self._process.poll() is None:
            self._process.terminate()
        return self.reap(timeout_seconds=grace_seconds)

    def reap(self, *, timeout_seconds: float) -> int:
        """Wait for its end, kill the whole group if that takes longer, and return the exit status."""
        status = end_group(self._process, timeout_seconds=timeout_seconds)
        assert self._process.stdin is not None
        self._process.stdin.close()
        return status


def describe_exit(status: int) -> str:
    """An exit status in words, as events show it."""
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"

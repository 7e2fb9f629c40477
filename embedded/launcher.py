"""The embedded service: every program on this machine, started in order, watched, and ended together.

Production runs the same programs (programs.py) under somebody else's supervision.
"""

import fcntl
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from app.core.errors import StartRefused
from app.core.settings import Settings
from embedded import programs, valkey
from finetuning.bases.fetch import FetchFailed
from worker.processes import Program, StartedProgram, inherited_environment, kill, start, stop, tail

BROKER_SECONDS = 20.0
READY_SECONDS = 180.0
MODEL_SECONDS = 900.0  # a large base from a slow disk
POLL_SECONDS = 0.1
# A program that ends this often within this time will not get better by starting it again.
MOST_RESTARTS = 3
RESTART_WINDOW_SECONDS = 120.0

Say = Callable[[str], None]


class StartFailed(Exception):
    """The service cannot run; the message says why and what to do."""


class Stopped(Exception):
    """Somebody asked us to end."""


@dataclass(frozen=True)
class RunningService:
    """A service that answers: its settings as they turned out (ports, keys) and its address."""

    settings: Settings
    address: str
    default_key: str
    baseline_key: str
    started: list[StartedProgram]
    restarts: dict[str, list[float]] = field(default_factory=dict)

    def wait_for_chat(self) -> None:
        """Wait until models answer. Raises StartFailed. Jobs need no such wait: only chat does."""
        health = self.settings.model_server_urls[0] + "/health"
        _wait("model server", lambda: _answers(health), MODEL_SECONDS, self.started)

    def watch(self) -> None:
        """Check once that every program lives, and start again what does not. Raises StartFailed if it keeps ending."""
        for i, one in enumerate(self.started):
            if not one.is_alive:
                self.started[i] = _restart(one, self.restarts.setdefault(one.program.name, []))


@contextmanager
def running(settings: Settings, say: Say, *, for_demo: bool = False) -> Iterator[RunningService]:
    """Run the service for the length of the block; afterwards no process of it is left.

    With `for_demo` the base may be another than before, and the project `baseline` is open. Call from the main thread.
    Raises StartFailed, and Stopped on SIGINT, SIGTERM or SIGHUP.
    """
    with _only_one(settings), _signals_raise():
        started: list[StartedProgram] = []
        try:
            yield _start_all(settings, say, started, for_demo=for_demo)
        finally:
            _end_all(started, say)


def serve_until_stopped(service: RunningService) -> None:
    """Watch over the programs until a signal comes. Raises Stopped, StartFailed."""
    while True:
        service.watch()
        time.sleep(POLL_SECONDS * 5)


def _start_all(settings: Settings, say: Say, started: list[StartedProgram], *, for_demo: bool) -> RunningService:
    settings, environment = programs.choose_ports(settings), inherited_environment()
    _fetch_base(settings, environment, say)
    say("starting broker, database, API, workers and model server")
    started.append(start(valkey.program(settings.runtime, settings.data, environment)))
    _wait("broker", lambda: valkey.answers(settings.runtime), BROKER_SECONDS, started)
    try:
        keys = programs.prepare_database(settings, for_demo=for_demo)
    except StartRefused as error:
        raise StartFailed(str(error)) from error
    started.extend(start(program) for program in programs.service_programs(settings, environment))
    address = f"http://{settings.host}:{settings.port}"
    _wait("API", lambda: _answers(address + "/readyz"), READY_SECONDS, started)
    return RunningService(settings, address + "/v1", keys.default, keys.baseline, started)


def _fetch_base(settings: Settings, environment: dict[str, str], say: Say) -> None:
    """Fetch the base unless it is here, in a process of its own: that needs torch, and must end when we are killed."""
    try:
        program = programs.base_program(settings, environment)
    except FetchFailed as error:
        raise StartFailed(str(error)) from error
    if program is None:
        return
    say(f"fetching the base {settings.base} (once)")
    program.log.unlink(missing_ok=True)  # so that its lines are this fetch's lines
    fetching, shown = start(program), 0
    try:
        while fetching.is_alive:
            time.sleep(POLL_SECONDS)
            shown = _relay(program.log, shown, say)
        _relay(program.log, shown, say)
    finally:
        kill([fetching])
    if fetching.process.returncode != 0:
        raise StartFailed(f"there is no base {settings.base} to start with; {program.log} says why")


def _relay(log: Path, shown: int, say: Say) -> int:
    """Say the whole lines of a log beyond the first `shown`; returns how many there are now."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    for line in lines[shown:]:
        say(line)
    return len(lines)


def _end_all(started: list[StartedProgram], say: Say) -> None:
    """End every program; a second signal ends the waiting. The broker goes last: the others still talk to it."""
    if not started:
        return
    say("stopping (a running job saves first; a second Ctrl-C does not wait for it)")
    try:
        stop(started[1:])
        stop(started[:1])
    except Stopped:
        with _signals_ignored():
            kill(started)


def _wait(name: str, is_ready: Callable[[], bool], seconds: float, started: list[StartedProgram]) -> None:
    deadline = time.monotonic() + seconds
    while not is_ready():
        for one in started:
            if not one.is_alive:
                raise StartFailed(_why_it_ended(one.program))
        if time.monotonic() > deadline:
            raise StartFailed(f"the {name} did not answer within {seconds:.0f} s; see {started[-1].program.log.parent}")
        time.sleep(POLL_SECONDS)


def _restart(ended: StartedProgram, at: list[float]) -> StartedProgram:
    """Start a dead program again; `at` holds the times of its earlier restarts."""
    now = time.monotonic()
    at[:] = [*(then for then in at if now - then < RESTART_WINDOW_SECONDS), now]
    if len(at) > MOST_RESTARTS:
        raise StartFailed(_why_it_ended(ended.program))
    stop([ended])  # its group may still hold processes
    return start(ended.program)


def _why_it_ended(program: Program) -> str:
    return f"the {program.name} ended; the end of {program.log}:\n{tail(program.log)}"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:  # noqa: S310 - our own address
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def _only_one(settings: Settings) -> Iterator[None]:
    settings.data.mkdir(parents=True, exist_ok=True)
    with (settings.data / "service.lock").open("w") as lock:
        if not _locked(lock):
            raise StartFailed(f"another service already runs on {settings.data}; stop it, or set IMMUNOTUNE_DATA")
        yield


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _raise_stopped(_signal: int, _frame: FrameType | None) -> None:
    raise Stopped


@contextmanager
def _signals_raise() -> Iterator[None]:
    before = {number: signal.signal(number, _raise_stopped) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _signals_ignored() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

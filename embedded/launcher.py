"""The embedded service: every part on this machine, started in order, watched, and ended together.

Knows the parts, their order and when they are ready; must not know jobs or models. Production runs the same
programs (programs.py) under somebody else's supervision.
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

from app.core.settings import Settings
from embedded import programs, valkey
from embedded.children import Child, Part, kill, start, stop, tail
from finetuning.bases.fetch import FetchFailed

BROKER_SECONDS = 20.0
READY_SECONDS = 180.0
MODEL_SECONDS = 900.0  # a large base from a slow disk
POLL_SECONDS = 0.1
# A part that ends this often within this time will not get better by starting it again.
MOST_RESTARTS = 3
RESTART_WINDOW_SECONDS = 120.0

Say = Callable[[str], None]


class StartFailed(Exception):
    """The service cannot run; the message says why and what to do."""


class Stopped(Exception):
    """Somebody asked us to end."""


@dataclass(frozen=True)
class Running:
    """A service that answers: its settings as they turned out (ports, keys) and its address."""

    settings: Settings
    address: str
    default_key: str
    baseline_key: str
    children: list[Child]
    restarts: dict[str, list[float]] = field(default_factory=dict)

    def wait_for_chat(self) -> None:
        """Wait until models answer. Raises StartFailed. Jobs need no such wait: only chat does."""
        health = self.settings.model_server_urls[0] + "/health"
        _wait("model server", lambda: _answers(health), MODEL_SECONDS, self.children)

    def watch(self) -> None:
        """Check once that every part lives, and start again what does not. Raises StartFailed when that is in vain."""
        for i, child in enumerate(self.children):
            if not child.is_alive:
                self.children[i] = _restart(child, self.restarts.setdefault(child.part.name, []))


@contextmanager
def running(settings: Settings, say: Say) -> Iterator[Running]:
    """Run the service for the length of the block; afterwards no process of it is left.

    Call from the main thread. Raises StartFailed, and Stopped on SIGINT, SIGTERM or SIGHUP.
    """
    with _only_one(settings), _signals_raise():
        children: list[Child] = []
        try:
            yield _start_all(settings, say, children)
        finally:
            _end_all(children, say)


def serve_until_stopped(service: Running) -> None:
    """Watch over the parts until a signal comes. Raises Stopped, StartFailed."""
    while True:
        service.watch()
        time.sleep(POLL_SECONDS * 5)


def _start_all(settings: Settings, say: Say, children: list[Child]) -> Running:
    settings = programs.choose_ports(settings)
    _fetch_base(settings, say)
    say("starting broker, database, API, workers and model server")
    broker = start(valkey.part(settings.runtime, settings.data))
    children.append(broker)
    _wait("broker", lambda: valkey.answers(settings.runtime), BROKER_SECONDS, children)
    keys = programs.prepare_database(settings)
    children.extend(start(part) for part in programs.programs(settings))
    address = f"http://{settings.host}:{settings.port}"
    _wait("API", lambda: _answers(address + "/readyz"), READY_SECONDS, children)
    return Running(settings, address + "/v1", keys.default, keys.baseline, children)


def _fetch_base(settings: Settings, say: Say) -> None:
    """Fetch the base unless it is here, in a process of its own: that needs torch, and must end when we are killed."""
    try:
        part = programs.fetching(settings)
    except FetchFailed as error:
        raise StartFailed(str(error)) from error
    if part is None:
        return
    say(f"fetching the base {settings.base} (once)")
    part.log.unlink(missing_ok=True)  # so that its lines are this fetch's lines
    child, told = start(part), 0
    try:
        while child.is_alive:
            time.sleep(POLL_SECONDS)
            told = _relay(part.log, told, say)
        _relay(part.log, told, say)
    finally:
        kill([child])
    if child.process.returncode != 0:
        raise StartFailed(f"there is no base {settings.base} to start with; {part.log} says why")


def _relay(log: Path, told: int, say: Say) -> int:
    """Say the whole lines of a log beyond the first `told`; returns how many there are now."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    for line in lines[told:]:
        say(line)
    return len(lines)


def _end_all(children: list[Child], say: Say) -> None:
    """End every part; a second signal ends the waiting. The broker goes last: the others still talk to it."""
    if not children:
        return
    say("stopping (a running job saves first; a second Ctrl-C does not wait for it)")
    try:
        stop(children[1:])
        stop(children[:1])
    except Stopped:
        with _signals_ignored():
            kill(children)


def _wait(name: str, is_ready: Callable[[], bool], seconds: float, children: list[Child]) -> None:
    deadline = time.monotonic() + seconds
    while not is_ready():
        for child in children:
            if not child.is_alive:
                raise StartFailed(_obituary(child.part))
        if time.monotonic() > deadline:
            raise StartFailed(f"the {name} did not answer within {seconds:.0f} s; see {children[-1].part.log.parent}")
        time.sleep(POLL_SECONDS)


def _restart(child: Child, at: list[float]) -> Child:
    """Start a dead part again; `at` holds the times of its earlier restarts."""
    now = time.monotonic()
    at[:] = [*(then for then in at if now - then < RESTART_WINDOW_SECONDS), now]
    if len(at) > MOST_RESTARTS:
        raise StartFailed(_obituary(child.part))
    stop([child])  # its group may still hold processes
    return start(child.part)


def _obituary(part: Part) -> str:
    return f"the {part.name} ended; the end of {part.log}:\n{tail(part.log)}"


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

"""Progress lines for a person: one line that renews itself in a terminal, a line now and then in a log."""

import sys
import time
from dataclasses import dataclass, field

TERMINAL_SECONDS = 0.2
LOG_SECONDS = 15.0
WIDTH = 24


@dataclass
class ProgressLine:
    """One long part of the work, made of stages. `expected_seconds` is what the whole part took on two cores."""

    what: str
    expected_seconds: float
    _begin: float = field(default_factory=time.monotonic)
    _shown: float = -LOG_SECONDS

    def show(self, stage: str = "", detail: str = "", *, share: float | None = None, left: float | None = None) -> None:
        """Show how far it is: `share` (0..1) of the present stage, `left` seconds of it when the service knows."""
        now = time.monotonic()
        if now - self._shown < (TERMINAL_SECONDS if _is_terminal() else LOG_SECONDS):
            return
        self._shown = now
        passed = now - self._begin
        # whichever is later: the stage's own estimate, or what all stages together usually take
        left = max(left or 0.0, self.expected_seconds - passed, 1.0)
        filled = min(WIDTH - 1, round(WIDTH * passed / (passed + left)))
        bar = "#" * filled + "." * (WIDTH - filled)
        counted = "" if share is None else f" {100 * share:.0f} %"
        _print(f"  {self.what} [{bar}] {passed:.0f} s, about {left:.0f} s left  {stage}{counted} {detail}", renew=True)

    def done(self, detail: str = "") -> float:
        """Say that it is over; returns the seconds it took."""
        seconds = time.monotonic() - self._begin
        _print(f"  {self.what}: {seconds:.0f} s  {detail}".rstrip())
        return seconds


def say(text: str) -> None:
    """One line that stays."""
    _print(text)


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _print(text: str, *, renew: bool = False) -> None:
    if not _is_terminal():
        print(text, flush=True)
        return
    # erase what the renewed line left, cut to the terminal so that the next renewal finds one line
    print("\r\033[K" + (text[:118] if renew else text), end="" if renew else "\n", flush=True)

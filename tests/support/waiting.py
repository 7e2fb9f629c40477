"""Waiting for a condition, with a deadline: the only place of the tests that sleeps."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], *, seconds: float) -> None:
    """Poll until the condition holds; fail the test when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.02)

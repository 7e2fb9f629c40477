"""Services to do harm to, with leases that are soon over."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.running import Running, running
from tests.support.worlds import SHORT

BRIEF = SHORT.model_copy(
    update={"ttl_seconds": 9.0, "self_stop_seconds": 4.0, "kill_seconds": 5.0, "rest_seconds": 1.0}
)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Running]:
    """A broker; what else a test wants, it starts. No process outlives it."""
    with running(tmp_path, BRIEF) as opened:
        yield opened

"""What clients notice of a broker that hangs: nothing."""

import os
import signal
import time

import httpx2

from tests.support.http import Customer
from worker.processes import StartedProgram


def test_a_create_does_not_wait_for_a_broker_that_hangs(customer: Customer, broker_process: StartedProgram) -> None:
    """S6: with Valkey stopped a create took 30 s and more, and some dozens of them silenced the health check."""
    file_id = customer.file_id()
    os.kill(broker_process.process.pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        for _ in range(10):
            assert customer.create(training_file=file_id).status_code == 200
        assert httpx2.get(f"{customer.served.url}/healthz", verify=False, timeout=5.0).status_code == 200
        assert time.monotonic() - begin < 8.0
    finally:
        os.kill(broker_process.process.pid, signal.SIGCONT)

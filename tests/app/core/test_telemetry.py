import json
import subprocess
import sys


def test_a_log_line_is_one_json_object_with_its_process_and_context() -> None:
    program = """
import structlog, threading
from app.core.telemetry import configure_logging
configure_logging("api", "info")
log = structlog.get_logger()
with structlog.contextvars.bound_contextvars(job_id="ftjob-x", fence=2):
    log.warning("lease.lost", reason="cancel")
log.debug("hidden")
threading.Thread(target=lambda: log.info("from.thread")).start()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = (json.loads(line) for line in done.stderr.splitlines())
    assert {first[key] for key in ("process", "job_id", "event", "level", "reason")} == {
        "api",
        "ftjob-x",
        "lease.lost",
        "warning",
        "cancel",
    }
    assert first["fence"] == 2
    assert (second["event"], second["process"]) == ("from.thread", "api")
    assert done.stdout == ""

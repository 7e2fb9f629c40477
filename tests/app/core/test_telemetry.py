import json
import subprocess
import sys

from sqlalchemy.exc import IntegrityError

from app.core.storage.database import Database
from app.core.storage.tables import Org, Project
from app.core.telemetry import trace_of


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


def test_a_trace_does_not_quote_the_values_that_were_wrong() -> None:
    """S24: what a row or a stored document holds stays out of logs, whoever raised."""
    program = """
import structlog
from pydantic import BaseModel
from app.core.telemetry import configure_logging
configure_logging("api", "info")
class Stored(BaseModel):
    number: int
try:
    try:
        Stored.model_validate({"number": "hunter2"})
    except ValueError as error:
        raise RuntimeError("cannot be read") from error
except RuntimeError:
    structlog.get_logger().exception("request.crashed")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    trace = json.loads(done.stderr)["exception"]
    assert "hunter2" not in trace
    assert "RuntimeError: cannot be read" in trace
    assert "int_parsing" in trace
    assert "in <module>" in trace


def test_a_trace_of_postgres_does_not_quote_its_row(database: Database, project: Project) -> None:
    """S24: a broken rule of the database is told by its name."""
    with database.writing() as session:
        session.add(Org(id="org-hunter2", name="x", slug="hunter2"))
        session.flush()
        session.add(Org(id="org-other", name="x", slug="hunter2"))
        try:
            session.flush()
        except IntegrityError:
            trace = trace_of(sys.exc_info())  # type: ignore[arg-type]  # an exception is being handled
    assert "hunter2" not in trace
    assert "IntegrityError" in trace
    assert project.id

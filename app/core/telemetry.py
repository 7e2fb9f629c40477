"""Logs and metrics: the set-up of structlog, and every metric's name. Never log rows, prompts or keys."""

import logging
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import TextIO, cast

import structlog
from prometheus_client import Counter, Gauge
from pydantic import ValidationError
from structlog.typing import EventDict, ExcInfo

JOBS_ENDED = Counter("immunotune_jobs_ended_total", "Jobs that reached a final state in this process.", ["state"])
LEASES_EXPIRED = Counter("immunotune_leases_expired_total", "Leases that this reaper took back.")
WAKES_FAILED = Counter("immunotune_wakes_failed_total", "Messages that the broker did not take.")
BLOBS_SWEPT = Counter("immunotune_blobs_swept_total", "Blobs deleted because no row needs them.")
CHECKS_OVERDUE = Gauge("immunotune_checks_overdue", "Jobs that no checks worker has judged within check_seconds.")
LETTERS_DEAD = Gauge("immunotune_dead_letters", "What came as a message and was none; the broker's list keeps them.")
JOBS_QUEUED = Gauge("immunotune_jobs_queued", "Jobs that wait for a worker, all projects.")
WORKERS_RESTING = Gauge("immunotune_workers_resting", "Workers that take no job: they lost several before any began.")
OLDEST_WAIT_SECONDS = Gauge("immunotune_oldest_wait_seconds", "Age of the oldest job that waits for a worker.")

JOBS_WITHOUT_BASE = Gauge("immunotune_jobs_without_base", "Jobs that wait for a base that is not served.")
DUTY_LAST_OK = Gauge("immunotune_duty_last_ok_seconds", "When the reaper last did this duty, unix seconds.", ["duty"])
DUTIES_FAILED = Counter("immunotune_duties_failed_total", "Duties of the reaper that raised.", ["duty"])
SWEEP_STOPPED = Gauge(
    "immunotune_sweep_stopped",
    "1 while the sweep deletes nothing: a foreign store, an audit due, or too much to go.",
)


def trace_of(exc_info: ExcInfo) -> str:
    """The trace of an exception as it is logged: without the values that it quotes, which may be a customer's."""
    text = "".join(traceback.format_exception(*exc_info)).rstrip("\n")
    error: BaseException | None = exc_info[1]
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, ValidationError):
            faults = error.errors(include_url=False, include_context=False, include_input=False)
            text = text.replace(str(error), f"{error.title}: {faults}")
        detail = getattr(getattr(error, "diag", None), "message_detail", None)  # Postgres quotes the row in question
        if detail:
            text = text.replace(str(detail), "(values left out)")
        error = error.__cause__ or error.__context__
    return text


@dataclass(frozen=True)
class _Unfailing:
    """A stream whose trouble is nobody's: whoever has an answer to give must not fail at saying so in a log.

    The disk that is full under a request is often the one on which the log lies.
    """

    stream: TextIO

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


def configure_logging(process: str, level: str) -> None:
    """One JSON line per event on standard error, `process` and all bound context in each. Once per process.

    A line that cannot be written is lost, and nothing else.
    """

    def name_process(_logger: object, _method: str, event: EventDict) -> EventDict:
        event["process"] = process
        return event

    structlog.configure(
        processors=[
            name_process,
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.ExceptionRenderer(trace_of),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _Unfailing(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=level.upper(), stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")

"""Watching jobs over HTTP: what the events say, as progress with an estimate.

Knows the OpenAI wire of jobs and events; must not know how jobs are run.
"""

import time
from collections.abc import Callable
from typing import Any

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from demo.ticker import Ticker

FINAL = ("succeeded", "failed", "cancelled")
POLL_SECONDS = 1.0
EVENTS_AT_ONCE = 20

Idle = Callable[[], None]


def follow(client: OpenAI, job_id: str, ticker: Ticker, idle: Idle) -> FineTuningJob:
    """Show a job's progress until it is final; `idle` is called between polls and may raise."""
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in FINAL:
            return job
        events = client.fine_tuning.jobs.list_events(job_id, limit=EVENTS_AT_ONCE).data
        ticker.show(*_newest(job, events))
        idle()
        time.sleep(POLL_SECONDS)


def _newest(job: FineTuningJob, events: list[FineTuningJobEvent]) -> tuple[str, float | None]:
    """What to say of a job, and how much of its present stage is done (None: nobody counted)."""
    if not events:
        return job.status, None
    event = events[0]
    data: dict[str, Any] = dict(event.data) if isinstance(event.data, dict) else {}
    stage = (getattr(job, "safety", None) or {}).get("stage", "")
    return f"{job.status} {stage}: {event.message}", _share(data)


def _share(data: dict[str, Any]) -> float | None:
    done, total = data.get("step", data.get("done")), data.get("total_steps", data.get("total"))
    return done / total if isinstance(done, int) and isinstance(total, int) and total > 0 else None

"""Watching jobs over HTTP: what the events say, as progress with an estimate.

Knows the OpenAI wire of jobs and events; must not know how jobs are run.
"""

import time
from collections.abc import Callable
from typing import Any

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from demo.ticker import Ticker

FINAL = ("succeeded", "failed", "cancelled")
POLL_SECONDS = 1.0

Idle = Callable[[], None]
Progress = dict[str, Any]


def follow(client: OpenAI, job_id: str, ticker: Ticker, idle: Idle) -> FineTuningJob:
    """Show a job's progress until it is final; `idle` is called between polls and may raise."""
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in FINAL:
            return job
        safety = getattr(job, "safety", None) or {}
        events = client.fine_tuning.jobs.list_events(job_id, limit=1).data
        message = events[0].message if events else job.status
        ticker.show(safety.get("stage", job.status), message, done_share(safety.get("progress") or {}))
        idle()
        time.sleep(POLL_SECONDS)


def done_share(progress: Progress) -> float | None:
    """How much of the present stage is done; None when nobody counted."""
    done, total = progress.get("step", progress.get("done")), progress.get("total_steps", progress.get("total"))
    return done / total if isinstance(done, int) and isinstance(total, int) and total > 0 else None

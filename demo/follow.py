"""Following jobs over HTTP, by OpenAI's jobs and events: their progress on one line, with an estimate."""

import time
from collections.abc import Callable
from typing import Any

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from demo.progress_line import ProgressLine

FINAL = ("succeeded", "failed", "cancelled")
POLL_SECONDS = 1.0

Idle = Callable[[], None]
StageFigures = dict[str, Any]


def follow(client: OpenAI, job_id: str, line: ProgressLine, idle: Idle) -> FineTuningJob:
    """Show a job's progress until it is final; `idle` is called between polls and may raise."""
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in FINAL:
            return job
        safety = getattr(job, "safety", None) or {}
        events = client.fine_tuning.jobs.list_events(job_id, limit=1).data
        show(line, safety.get("stage", job.status), events[0].message if events else "", safety.get("progress"))
        idle()
        time.sleep(POLL_SECONDS)


def show(line: ProgressLine, stage: str, message: str, progress: StageFigures | None) -> None:
    """Show a stage with what the service counted in it: training steps, or rows and prompts."""
    figures = progress or {}
    done, total = figures.get("step", figures.get("done")), figures.get("total_steps", figures.get("total"))
    share = done / total if isinstance(done, int) and isinstance(total, int) and total > 0 else None
    line.show(stage, message, share=share, left=figures.get("seconds_left"))

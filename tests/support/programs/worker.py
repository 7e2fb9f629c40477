"""A real Celery worker whose training processes are the stand-in: `python worker.py SCRIPT_JSON QUEUES`."""

import json
import sys

from app.core.settings import load_settings
from tests.support.worlds import scripted
from worker.tasks import run_worker

if __name__ == "__main__":
    sys.exit(run_worker(load_settings(), sys.argv[2].split(","), launcher=scripted(**json.loads(sys.argv[1]))))

"""An API process that dies between commit and wake-up: queues the job whose recipe is on stdin, then kills itself."""

import os
import signal
import sys

from app.core.settings import load_settings
from app.core.storage.blobs import open_blobs
from app.core.storage.database import open_database
from finetuning.contract.recipe import Recipe
from tests.support.worlds import Scene

if __name__ == "__main__":
    settings = load_settings()
    scene = Scene(settings, open_database(settings), open_blobs(settings), "")
    sys.stdout.write(scene.add_job(Recipe.model_validate_json(sys.stdin.read())))
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)

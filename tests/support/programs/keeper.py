"""A worker with secrets in its environment that starts a training process, and prints what that says."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from worker.attempt.launch import launch_command
from worker.attempt.training_process import TrainingProcess
from worker.processes import keep_to_ourselves

keep_to_ourselves()
scratch, spy = Path(sys.argv[1]), sys.argv[2]
launch = launch_command(scratch, "run")
argv = (*launch.argv[: launch.argv.index("-m")], spy, str(scratch))
launch = replace(launch, argv=argv, env={**launch.env, "SPY_TARGETS": os.environ["SPY_TARGETS"]})
child = TrainingProcess(launch, log=scratch / "train.log")
said = [json.loads(line) for line in child.lines()]
status = child.reap(timeout_seconds=30.0)
sys.stdout.write(json.dumps({"status": status, "said": {line["code"]: line["message"] for line in said}}))

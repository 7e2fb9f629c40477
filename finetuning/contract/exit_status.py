"""What the training process says by how it ends, where it could not print a last line."""

STOPPED = 143
"""Asked to stop by SIGTERM."""
ORPHANED = 144
"""Whoever started it is gone."""
UNAVAILABLE = 145
"""The host or what it reaches gave out (a full disk, a lost device, a judge that does not answer): not the job's."""

NOT_THE_JOBS = frozenset({STOPPED, ORPHANED, UNAVAILABLE})

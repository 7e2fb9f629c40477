"""Whose loss it is when an attempt ends without a result: the job's, the worker's, or the store's."""

import errno
import signal

from app.core.errors import StorageFull
from app.core.jobs.ended import ReleaseCause
from finetuning.contract.exit_status import NOT_THE_JOBS
from worker.attempt.watched_store import StoreTrouble

# What a process does to itself; any other signal is sent from outside: by a person, the kernel (memory), a quota.
_OWN_SIGNALS = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS})


def cause_of_exit(status: int, *, began: bool, garbled: bool) -> ReleaseCause:
    """Whose loss a training process is that ended with `status` and without a final line.

    The job's if it ended by itself after its work had `began`, or printed what is no progress (`garbled`): the program
    does that anywhere. A process that dies before it could begin says that something is wrong with its host.
    """
    if garbled:
        return ReleaseCause.FAULT
    killed = status < 0 and -status not in _OWN_SIGNALS
    return ReleaseCause.HOST if killed or status in NOT_THE_JOBS or not began else ReleaseCause.FAULT


def cause_of_error(error: Exception) -> ReleaseCause:
    """Whose loss an exception of the supervisor is: never the job's."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return ReleaseCause.STORAGE if full or isinstance(error, (StorageFull, StoreTrouble)) else ReleaseCause.HOST

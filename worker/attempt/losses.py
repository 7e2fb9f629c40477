"""Whose loss it is when an attempt ends without a result: the job's, the worker's, or the store's."""

import errno
import signal

from app.core.errors import StorageFull
from app.core.jobs.ended import ReleaseCause
from app.core.storage.blobs import BlobMissing, BlobStore, CorruptBlob
from finetuning.contract.exit_status import NOT_THE_JOBS, UNAVAILABLE
from worker.attempt.watched_store import StoreTrouble, require_store

# What a process does to itself; any other signal is sent from outside: by a person, the kernel (memory), a quota.
_OWN_SIGNALS = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS})


def cause_of_exit(status: int, *, began: bool, garbled: bool) -> ReleaseCause:
    """Whose loss a training process is that ended with `status` and without a final line.

    The job's if it ended by itself after its work had `began`, or printed what is no progress (`garbled`): the program
    does that anywhere. A process that dies before it could begin says that something is wrong with its host. One that
    names what gave out under it (a judge, a disk, a device) says nothing about the job, however long that lasts.
    """
    if garbled:
        return ReleaseCause.FAULT
    if status == UNAVAILABLE:
        return ReleaseCause.UNFIT
    killed = status < 0 and -status not in _OWN_SIGNALS
    return ReleaseCause.HOST if killed or status in NOT_THE_JOBS or not began else ReleaseCause.FAULT


def cause_of_error(error: Exception, store: BlobStore) -> ReleaseCause:
    """Whose loss an exception of the supervisor is: never the job's.

    A blob that is missing or altered is the store's where `store`, as an attempt sees it, is not there at all.
    """
    if isinstance(error, (BlobMissing, CorruptBlob)):
        try:
            require_store(store)
        except StoreTrouble:
            return ReleaseCause.STORAGE
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return ReleaseCause.STORAGE if full or isinstance(error, (StorageFull, StoreTrouble)) else ReleaseCause.HOST

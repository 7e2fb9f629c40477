"""What a training process takes from itself before it reads a row: files that are none of its business, the network,
other processes, capabilities. Nothing of it can be undone by what runs later.

Linux: Landlock where the kernel has it, a network and mount namespace where the platform lets us make one; elsewhere
nothing. docs/security.md says what then holds by convention only. Call before any thread is started.
"""

import contextlib
import ctypes
import os
import platform
import resource
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_LARGEST_FILE = 64 * 2**30
_MORE_PROCESSES = 1024
_MEMORIES = 2  # of address space, against the machine's memory; mapped weights count in it

# <linux/prctl.h>, <linux/sched.h>, <linux/mount.h>, <linux/capability.h>
_PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 38, 24
_NEW_MOUNTS, _NEW_USER, _NEW_NETWORK = 0x00020000, 0x10000000, 0x40000000
_MS_READ_ONLY, _MS_NOSUID, _MS_NODEV, _MS_PRIVATE_ALL = 1, 2, 4, 1 << 18 | 1 << 14
_CAPABILITIES_3 = 0x20080522
# what a superuser needs to read folders of the user who owns the data: chown, both dac_*, fowner
_FILE_CAPABILITIES = 0b1111

# <linux/landlock.h>; the system calls have these numbers on every architecture
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _TRUNCATE = 1, 1 << 1, 1 << 2, 1 << 14
_MAKE_AND_REMOVE = sum(1 << bit for bit in (4, 5, 6, 7, 8, 9, 10, 11, 12, 13))
_READ = _EXECUTE | _READ_FILE
_OF_FILES = _READ | _WRITE_FILE | _TRUNCATE
# the ABI with which each came
_REFER_SINCE, _TRUNCATE_SINCE, _NETWORK_SINCE, _SCOPE_SINCE = 2, 3, 4, 6
_REFER, _TCP, _SCOPES = 1 << 13, 0b11, 0b11


@dataclass(frozen=True)
class Reach:
    """What stays reachable. `private` folders are closed but for what lies in them and is named in the other two;
    elsewhere everything can be read, and only `written` be changed. `network`: whether anybody may be connected to.
    """

    private: Sequence[Path] = ()
    read: Sequence[Path] = ()
    written: Sequence[Path] = ()
    network: bool = False


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def enforced_here() -> bool:
    """Whether this kernel can close files and other processes to us."""
    return _landlock_version() > 0


def confine(reach: Reach) -> tuple[str, ...]:
    """Close all but `reach` to this process and to all that it starts; returns in words what could not be closed."""
    if not sys.platform.startswith("linux"):
        return (f"{sys.platform} has nothing that closes files or the network",)
    missing = _leave_namespaces(reach)
    _drop_capabilities()
    version = _landlock_version()
    if version == 0:
        return (*missing, "files and other processes: the kernel has no Landlock")
    _restrict(version, reach)
    closed_by_landlock = version >= _NETWORK_SINCE and not reach.network
    return tuple(word for word in missing if not (word.startswith("network") and closed_by_landlock))


def limit_ourselves() -> None:
    """Bound what one training process can take of the machine, and offer it first when memory runs out."""
    _limit(resource.RLIMIT_CORE, 0)  # the order in its memory has a secret
    _limit(resource.RLIMIT_FSIZE, _LARGEST_FILE)
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    _limit(resource.RLIMIT_NPROC, _threads_of(os.getuid()) + _MORE_PROCESSES)
    if not Path("/dev/nvidiactl").exists():  # CUDA reserves far more addresses than there is memory
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        _limit(resource.RLIMIT_AS, max(_MEMORIES * memory, 16 * 2**30))


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (most, most))


def _threads_of(user: int) -> int:
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended
            if folder.stat().st_uid == user:
                found += sum(1 for _ in (folder / "task").iterdir())
    return found


def _leave_namespaces(reach: Reach) -> tuple[str, ...]:
    """A network without anybody in it, and private folders of sockets covered; in words what could not be had."""
    if not _succeeds(lambda: _enter_namespaces(reach)):
        return () if reach.network else ("network: no namespace can be made here",)
    _enter_namespaces(reach)
    uncovered = ("sockets: private folders could not be covered",)
    if _libc().mount(b"none", b"/", None, _MS_PRIVATE_ALL, None) != 0:
        return uncovered  # what is mounted now would be so for everybody
    missing: tuple[str, ...] = ()
    for folder in reach.private:
        if folder.is_dir() and not any(path.is_relative_to(folder) for path in (*reach.read, *reach.written)):
            options = _MS_READ_ONLY | _MS_NOSUID | _MS_NODEV  # Landlock does not see who connects to a unix socket
            if _libc().mount(b"tmpfs", os.fsencode(folder), b"tmpfs", options, None) != 0:
                missing = uncovered
    return missing


def _enter_namespaces(reach: Reach) -> None:
    """Raises OSError, perhaps half-way: a platform may allow the first step and refuse the next (AppArmor does)."""
    flags = _NEW_MOUNTS | (0 if reach.network else _NEW_NETWORK)
    user, group = os.getuid(), os.getgid()
    if user != 0:
        flags |= _NEW_USER
    _checked(_libc().unshare(flags), "unshare")
    if user != 0:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")


def _succeeds(step: Callable[[], object]) -> bool:
    """Whether a step that cannot be undone would succeed: a child, which then ends, tries it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            step()
            status = 0
        finally:
            os._exit(status)  # nothing of the parent's is unwound twice
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _write(path: str, text: str) -> None:
    Path(path).write_text(text, encoding="ascii")


def _drop_capabilities() -> None:
    """All of them; a superuser keeps what opens files of other users, within what Landlock leaves open."""
    kept = _FILE_CAPABILITIES if os.getuid() == 0 else 0
    _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for number in range(64):
        if not kept >> number & 1:
            _libc().prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    words = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)
    _libc().capset(ctypes.byref(_CapabilityHeader(_CAPABILITIES_3, 0)), ctypes.byref(words))


def _landlock_version() -> int:
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "aarch64"):
        return 0
    return max(0, int(_libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def _restrict(version: int, reach: Reach) -> None:
    """Raises OSError: a process that cannot be restricted although the kernel could must not train."""
    changes = _WRITE_FILE | _MAKE_AND_REMOVE | (_TRUNCATE if version >= _TRUNCATE_SINCE else 0)
    if version < _REFER_SINCE:
        changes &= ~_REFER
    net = _TCP if version >= _NETWORK_SINCE and not reach.network else 0
    rules = _Ruleset(_READ | changes, net, _SCOPES if version >= _SCOPE_SINCE else 0)
    # an older kernel refuses a structure that is longer than its own unless the rest is 0
    size = ctypes.sizeof(rules)
    ruleset = _checked(_libc().syscall(_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(size), ctypes.c_uint32(0)))
    try:
        for path in _open_paths(reach):
            _allow(ruleset, path, _READ)
        for path in (*reach.written, *map(Path, ("/dev", "/proc/self"))):
            _allow(ruleset, path, _READ | changes)
        _checked(_libc().syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # it is gone, or never was
        return
    try:
        if not stat.S_ISDIR(os.fstat(opened).st_mode):
            rights &= _OF_FILES
        rule = _PathRule(rights, opened)
        _checked(_libc().syscall(_ADD_RULE, ruleset, 1, ctypes.byref(rule), ctypes.c_uint32(0)))
    finally:
        os.close(opened)


def _open_paths(reach: Reach) -> Iterator[Path]:
    """The largest folders that hold nothing private, from the root, and what is open within private ones."""
    private = [folder.resolve() for folder in reach.private]
    for path in reach.read:
        yield from _around(path, [folder for folder in private if folder != path and folder.is_relative_to(path)])
    yield from _around(Path("/"), private)


def _around(folder: Path, private: Iterable[Path]) -> Iterator[Path]:
    if folder in private:
        return
    if not any(other.is_relative_to(folder) for other in private):
        yield folder
        return
    with contextlib.suppress(OSError):
        for child in folder.iterdir():
            if not child.is_symlink():
                yield from _around(child, private)


def _checked(result: int, what: str = "Landlock") -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)

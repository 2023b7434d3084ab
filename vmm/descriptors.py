"""How many descriptors this process may have open: as many as its hard limit lets it.

The usual soft limit, 1024, is for programs that use select(2); 40 machines with all devices exceed
it. The limit is raised when a machine is made, as Go's and Java's run times do; helper programs get
the one that was there before. What guests can cause (connections) never takes the last quarter.
"""

from __future__ import annotations

import errno
import resource
from contextlib import suppress

from vmm.errors import HostError

MOST = 1 << 20
"""The soft limit is not raised beyond that: there are programs that close them one by one."""



class FilesExhausted(HostError):
    """No more files can be opened."""


_before: tuple[int, int] | None = None
_raised = False


def raise_limit() -> None:
    """Raise the soft limit to the hard one, or MOST; once in a process: one that a program sets
    later is what it wants."""
    global _before, _raised
    if _raised:
        return
    _raised = True
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        _before = soft, hard


def give_former(pid: int) -> None:
    """Have the helper program `pid` be limited as this process was."""
    if _before is not None:
        with suppress(OSError, ValueError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, _before)


def limit() -> int:
    """How many there may be now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else soft


def scarce(fd: int) -> bool:
    """Whether `fd`, which was just opened, is one of the last quarter: the kernel gives the lowest
    number that is free, so that many are open."""
    return fd >= limit() - limit() // 4


def exhausted(err: BaseException | None) -> FilesExhausted | None:
    """What to say where `err`, or its cause, is that there are no descriptors left; else None."""
    while err is not None:
        if isinstance(err, FilesExhausted):
            return err
        number = getattr(err, "errno", 0)
        if number == errno.EMFILE:
            return FilesExhausted(
                f"Too many open files: this process has all {limit()} that it may have "
                "(`ulimit -n`); close machines, or raise the limit (`ulimit -Hn`, LimitNOFILE=)"
            )
        if number == errno.ENFILE:
            return FilesExhausted("Too many open files on this host: see sysctl fs.file-max")
        err = err.__cause__ or err.__context__
    return None


class _Told:
    """A context manager: an error of what is in it that means FilesExhausted becomes one."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, err: BaseException | None, where: object) -> None:
        told = exhausted(err)
        if told is not None and told is not err:
            raise told from err


told = _Told()

"""Where this user's caches are: $VMM_CACHE/NAME, by default ~/.cache/vmm/NAME.

A cache is used only where nobody but this user can have written what is in it, and made only where
the place is this user's: root with an ordinary user's HOME (sudo) neither reads theirs nor leaves
anything of root's there.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress


def find(name: str) -> str:
    """The path of the cache `name`, whose directory is made if it is not there. Raises OSError,
    PermissionError where its place is another user's."""
    base = os.environ.get("VMM_CACHE")
    if not base:
        parent = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        base = os.path.join(parent, "vmm")
    path = os.path.join(base, name)
    if not os.path.isabs(path):
        raise PermissionError(f"{path}: not an absolute path")
    if not os.path.lexists(path):
        there = base
        while not os.path.lexists(there):
            there = os.path.dirname(there)
        if os.stat(there).st_uid != os.geteuid():
            raise PermissionError(f"{there} belongs to another user")
        os.makedirs(path, mode=0o700, exist_ok=True)
    return path


def is_own(status: os.stat_result) -> bool:
    """Whether only this user can have written what has this status."""
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def open_own(path: str) -> int:
    """A descriptor of the directory `path`, which the caller closes. Raises OSError,
    PermissionError where it is not this user's own.

    One that was made under umask 002 is taken from the group first. (What others have put into it
    is theirs, and stays so.)
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(fd)
    if status.st_uid == os.geteuid() and status.st_mode & 0o022 == 0o020:
        with suppress(OSError):
            os.fchmod(fd, stat.S_IMODE(status.st_mode) & ~0o020)
    if not is_own(os.fstat(fd)):
        os.close(fd)
        raise PermissionError(f"{path}: others may write there")
    return fd


def read(directory: int, name: str, limit: int) -> bytes | None:
    """The file `name` of an open directory, this user's own and `limit` bytes at most; else
    None."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=directory)
    except OSError:
        return None
    with open(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not is_own(status) or status.st_size > limit:
            return None
        try:
            return file.read(limit)
        except OSError:
            return None

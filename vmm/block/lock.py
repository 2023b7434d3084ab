"""Who uses an image: locks on its bytes, laid out as QEMU's are (block/file-posix.c there), so that
QEMU, its tools and this monitor respect each other.

A user of the image locks byte 100 + n for each permission n it needs, and byte 200 + n for each
that it wants nobody else to have, shared; then it looks whether anybody else's locks contradict.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from contextlib import suppress

from vmm.errors import HostError

F_OFD_GETLK, F_OFD_SETLK = 36, 37
"""Linux, include/uapi/asm-generic/fcntl.h: locks of the open file, not of the process."""
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len, l_pid

READ, WRITE, RESIZE = 0, 1, 3
"""QEMU's BLK_PERM_CONSISTENT_READ, _WRITE and _RESIZE, as bit numbers."""
DENY = (WRITE, RESIZE)
NEEDED, DENIED = 100, 200
"""Where the bytes of either kind begin."""


def lock(fd: int, *, write: bool) -> bool:
    """Use the image as its only writer, or as one of its readers; False if others contradict.

    The locks go with the last descriptor of the open file. Where there are no locks (some network
    file systems), it is taken for free.
    """
    try:
        for place in _needed(write):
            _lock_byte(fd, F_OFD_SETLK, fcntl.F_RDLCK, NEEDED + place)
        for place in DENY:
            _lock_byte(fd, F_OFD_SETLK, fcntl.F_RDLCK, DENIED + place)
        return free(fd, write=write)
    except OSError as err:
        return _no_locks(err)


def unlock(fd: int) -> None:
    """Let the image go, although another process may have the same open file: a forked child."""
    with suppress(OSError):  # there are no locks there
        fcntl.fcntl(fd, F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, NEEDED, 2 * NEEDED, 0))


def free(fd: int, *, write: bool) -> bool:
    """Whether `lock` would succeed now; nothing is locked."""
    try:
        return all(_free(fd, DENIED + place) for place in _needed(write)) and all(
            _free(fd, NEEDED + place) for place in DENY
        )
    except OSError as err:
        return _no_locks(err)


def wait_free(path: str, *, write: bool, within: float) -> None:
    """Wait until nobody's use of the image contradicts ours, for that many seconds at most.

    For the image of a machine that was killed a moment ago: the process that served it is told to
    end then, and may not have ended yet. What keeps the image from being used is not told of here.
    """
    limit = time.monotonic() + within
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while not free(fd, write=write) and time.monotonic() < limit:
                time.sleep(0.01)
        finally:
            os.close(fd)


def in_use(path: str, fd: int, *, write: bool) -> HostError:
    """What to say where the image, open as `fd`, cannot be locked."""
    other = "end it" if not write else "end it, or give this machine a copy"
    if write and free(fd, write=False):  # they only read it
        other = f"end it, or say {path.replace(',', ',,')},readonly"
    return HostError(f"--drive {path}: another process uses this image; {other}")


def _needed(write: bool) -> tuple[int, ...]:
    return (READ, WRITE) if write else (READ,)


def _no_locks(err: OSError) -> bool:
    """Whether an image is free where locking has failed so."""
    if err.errno in (errno.EAGAIN, errno.EACCES):
        return False
    if err.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
        return True
    raise err


def _free(fd: int, place: int) -> bool:
    """Whether nobody else has a lock on byte `place`."""
    return _lock_byte(fd, F_OFD_GETLK, fcntl.F_WRLCK, place) == fcntl.F_UNLCK


def _lock_byte(fd: int, command: int, kind: int, place: int) -> int:
    answer = fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, place, 1, 0))
    return int(_FLOCK.unpack(answer)[0])

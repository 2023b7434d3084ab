"""Listening UNIX sockets of devices: a stale one is replaced, a live one never, ours is removed."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from contextlib import suppress

from vmm.errors import UsageError
from vmm.forked import drop_in_child

PATH_MAX = 107
"""Bytes in sockaddr_un.sun_path, less its NUL."""
NOBODY = (-1, -1)


def check_path(option: str, path: str, more: int = 0) -> None:
    """UsageError where no socket can be called `path` with `more` bytes after it."""
    size, limit = len(os.fsencode(path)), PATH_MAX - more
    if not 0 < size <= limit:
        raise UsageError(
            f"{option}: {size} bytes are too long for a socket's name; at most {limit}, "
            "or give a path relative to the working directory"
        )


def listen(path: str, option: str) -> tuple[socket.socket, tuple[int, int]]:
    """A socket that does not block, and what `remove` wants. UsageError begins with `option`."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        # Two monitors that find one stale socket must not remove each other's new one.
        directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            _make_way(path, option)
            listener.bind(path)
            listener.listen(128)
            found = os.stat(path)
        finally:
            os.close(directory)
    except OSError as err:
        listener.close()
        raise UsageError(
            f"{option}: {err.strerror or err}; give a path in a directory that exists and can be "
            "written"
        ) from err
    except BaseException:
        listener.close()
        raise
    listener.setblocking(False)
    drop_in_child(listener)
    return listener, (found.st_dev, found.st_ino)


def remove(path: str, identity: tuple[int, int]) -> None:
    """Remove the socket `listen` made, unless another has taken its place."""
    with suppress(OSError):
        found = os.stat(path)
        if (found.st_dev, found.st_ino) == identity:
            os.unlink(path)


def _make_way(path: str, option: str) -> None:
    """Remove a socket nobody listens on."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{option} is there and is not a socket; give another path")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise UsageError(f"{option} is in use by another process; give each machine its own path")

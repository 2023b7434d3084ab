"""Listening UNIX sockets of devices: a stale one is replaced, a live one never, ours is removed."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from contextlib import contextmanager, suppress

from vmm import socket_owner
from vmm.errors import HostError, UsageError
from vmm.forked import drop_in_child

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Iterator

PATH_MAX = 107
"""Bytes in sockaddr_un.sun_path, less its NUL."""
LAST_MAX = PATH_MAX - len("/proc/self/fd/1234567/")
"""Bytes of a path's last part, where the whole is longer than PATH_MAX."""
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")
NOBODY = (-1, -1)
LOCKED_WITHIN = 2.0
"""Seconds to wait for a directory that another process has locked."""
listening: dict[str, tuple[int, int]] = {}
"""Paths of the sockets that `listen` has made and `remove` has not removed yet, and the device and
inode number of each: a process that gives up removing files has another do it."""


def check_path(option: str, path: str, more: int = 0) -> None:
    """UsageError where no socket can be called `path` with `more` bytes after it."""
    size, limit = len(os.fsencode(path)), PATH_MAX - more
    if 0 < size <= limit:
        return
    if not size:
        raise UsageError(f"{option.rstrip()}: no path; give one, as /tmp/vm.sock")
    name = len(os.fsencode(os.path.basename(path)))
    if not 0 < name <= LAST_MAX - more:
        raise UsageError(
            f"{option}: {name or size} bytes are too long for a socket's name; at most {limit}, or "
            f"{LAST_MAX - more} after the last / of a longer path"
        )


@contextmanager
def reachable(path: str) -> Iterator[str]:
    """A name of socket `path` that fits into its address, for as long as the block. OSError."""
    if len(os.fsencode(path)) <= PATH_MAX:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def connect(sock: socket.socket | _socket.socket, path: str) -> None:
    """Connect to the socket `path`, however long that is, unless it may be another user's (see
    `vmm.socket_owner`). OSError, ValueError."""
    with reachable(path) as name:
        sock.connect(name)
    socket_owner.check(sock, path)


def listen(path: str, option: str) -> tuple[socket.socket, tuple[int, int]]:
    """A socket that does not block and that only this user can connect to, and what `remove` wants.
    UsageError begins with `option`."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        # Two monitors that find one stale socket must not remove each other's new one.
        directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(directory)
            _make_way(path, option)
            # What bind(2) gives the name, whatever the umask: it is for this user's programs only.
            os.fchmod(listener.fileno(), 0o600)
            with reachable(path) as name:
                listener.bind(name)
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
    listening[path] = found.st_dev, found.st_ino
    return listener, (found.st_dev, found.st_ino)


def remove(path: str, identity: tuple[int, int]) -> None:
    """Remove the socket `listen` made, unless another has taken its place."""
    listening.pop(path, None)
    with suppress(OSError):
        found = os.stat(path)
        if (found.st_dev, found.st_ino) == identity:
            os.unlink(path)


def remove_stale(path: str) -> None:
    """Remove the socket `path` of a process that has ended, if nobody listens on it."""
    with suppress(OSError, UsageError):
        directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(directory)
            _make_way(path, path)
        finally:
            os.close(directory)


def _lock(directory: int) -> None:
    """Lock the open `directory`, against other monitors. OSError where somebody else has it locked
    and does not let it go: whoever may read a directory may lock it."""
    limit = time.monotonic() + LOCKED_WITHIN
    while True:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > limit:
                raise OSError(
                    errno.EAGAIN, "another process keeps the directory locked (flock)"
                ) from None
            time.sleep(0.01)
        else:
            return


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
            connect(probe, path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise UsageError(f"{option} is in use by another process; give each machine its own path")


@contextmanager
def bound_for_now(sock: socket.socket) -> Iterator[str]:
    """Bind `sock` to a path that only this user reaches, and that is gone at the end of the block.

    It is in the directory for temporary files, or, where no socket can be made there (it is not
    there, read-only, or of a kind without sockets), in another. Raises HostError.
    """
    why = ""
    for base in (os.environ.get("TMPDIR"), *TEMPORARY, f"/run/user/{os.geteuid()}"):
        if not base:
            continue
        directory = os.path.join(base, f"vmm-{os.urandom(8).hex()}")
        path = os.path.join(directory, "socket")
        try:
            os.mkdir(directory, 0o700)
            try:
                with reachable(path) as name:
                    sock.bind(name)
            except BaseException:
                os.rmdir(directory)
                raise
        except OSError as err:
            if err.errno in (errno.EMFILE, errno.ENFILE):
                raise
            why = why or f"{base}: {err.strerror or err}"
            continue
        try:
            yield path
        finally:
            with suppress(OSError):
                os.unlink(path)
            with suppress(OSError):
                os.rmdir(directory)
        return
    raise HostError(f"no socket for a helper can be made in {why}; have TMPDIR name a directory")

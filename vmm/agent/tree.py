"""Files and directory trees as a stream of entries, this side of vmm/agent/tree.c.

A name is one component, a directory is followed by what is in it and an UP, and below what was
asked for no link is followed: a hostile guest's stream stays where the caller wants it.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import struct
from contextlib import suppress

from vmm.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from typing import BinaryIO

    Count = Callable[[int], None]

ENTRY = struct.Struct("<BBHIQqII")
"""kind, zero, name_size, mode, size, seconds, nanoseconds, zero; then the name."""
_SIZE = struct.Struct("<I")
DIRECTORY, REGULAR, LINK, FIFO, UP, LAST = b"dflpue"
CHUNK = 64 << 10
DEPTH_MAX = 256
NAME_MAX = 255
TARGET_MAX = 4095
MAX_BYTES = 64 << 30
"""File data that one `get` takes from a guest, if nothing else is said."""
ENTRIES_MAX = 1 << 20
"""Files, directories and links that one `get` takes from a guest."""
MODES, MODES_OF_ALL = 0o755, 0o1777
"""What is kept of the mode of a guest's file: others may not write it, as by tarfile's `data`
filter. Never set-user-ID, which is the guest's business, not the host's."""
TIME_MIN, TIME_MAX = -62_135_510_400, 253_402_214_400
"""Seconds, a day from the ends of what Python's datetime holds; times beyond are set to these."""
NANOSECONDS = 1_000_000_000
LOOK = 0.2
"""Seconds between two looks whether what waits for a pipe of this host is still wanted."""
_FLAGS = os.O_CLOEXEC | os.O_NOCTTY


def entry(kind: int, name: str = "", status: os.stat_result | None = None, size: int = 0) -> bytes:
    """One entry's head."""
    encoded = os.fsencode(name)
    mode, seconds, nanoseconds = 0, 0, 0
    if status is not None:
        mode = stat.S_IMODE(status.st_mode)
        seconds, nanoseconds = divmod(status.st_mtime_ns, NANOSECONDS)
    head = ENTRY.pack(kind, 0, len(encoded), mode, size, seconds, nanoseconds, 0)
    return head + encoded


def _nobody(size: int) -> None:
    """Nobody counts."""


def pack(
    path: str,
    count: Count = _nobody,
    *,
    wanted: Callable[[], bool] = lambda: True,
    mode: int | None = None,
) -> Generator[bytes, None, None]:
    """The stream of what is at `path` on this host, which may be a link to it.

    Args:
        count: called with the size in bytes of each piece of file data in the stream.
        wanted: asked again and again while a pipe or device has nothing to read; False, or what it
            raises, ends the wait.
        mode: of a file, in place of its own.

    Raises:
        OSError: something cannot be read, or carried (a device in a tree).
    """
    status = os.stat(path)
    if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
        yield from _pack(path, "", 0, count, mode)
    else:  # opened without a wait: a pipe may have no writer yet
        special = Special(os.open(path, os.O_RDONLY | os.O_NONBLOCK | _FLAGS), wanted)
        try:
            yield entry(REGULAR, "", _with_mode(status, mode))
            yield from _chunks(special, count)
        finally:
            special.close()
    yield entry(LAST)


def pack_file(
    file: BinaryIO, mode: int = 0o644, count: Count = _nobody
) -> Generator[bytes, None, None]:
    """The stream of one file whose data `file` gives, as of now; `count` as of `pack`."""
    import time

    seconds, nanoseconds = divmod(time.time_ns(), NANOSECONDS)
    yield ENTRY.pack(REGULAR, 0, 0, mode, 0, seconds, nanoseconds, 0)
    yield from _chunks(file, count)
    yield entry(LAST)


class Special:
    """A pipe or device of this host, read and written without a wait that nobody can end.

    Args:
        fd: not blocking; closed by `close`.
        wanted: as of `pack`.
    """

    def __init__(self, fd: int, wanted: Callable[[], bool]) -> None:
        self._fd = fd
        self._wanted = wanted

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)

    def read(self, size: int) -> bytes:
        """Up to so many bytes; none at the end."""
        while self._ready(select.POLLIN):
            with suppress(BlockingIOError):
                return os.read(self._fd, size)
        return b""

    def write(self, data: bytes | memoryview) -> int:
        """Write some of it; how much."""
        while self._ready(select.POLLOUT):
            with suppress(BlockingIOError):
                return os.write(self._fd, data)
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def _ready(self, event: int) -> bool:
        poll = select.poll()
        poll.register(self._fd, event)
        while not poll.poll(LOOK * 1000):
            if not self._wanted():
                return False
        return True


def _pack(
    path: str, name: str, depth: int, count: Count, as_mode: int | None = None
) -> Generator[bytes, None, None]:
    try:
        status = os.lstat(path) if depth else os.stat(path)
    except FileNotFoundError:
        if depth:
            return  # gone since the directory was read
        raise
    mode = status.st_mode
    status = _with_mode(status, as_mode)
    if stat.S_ISDIR(mode):
        if depth == DEPTH_MAX:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        yield entry(DIRECTORY, name, status)
        with os.scandir(path) as found:
            names = sorted(item.name for item in found)
        for below in names:
            yield from _pack(os.path.join(path, below), below, depth + 1, count)
        yield entry(UP)
    elif stat.S_ISLNK(mode):
        target = os.fsencode(os.readlink(path))
        yield entry(LINK, name, status, len(target)) + target
    elif stat.S_ISREG(mode):
        with open(path, "rb", buffering=0) as file:
            yield entry(REGULAR, name, status, status.st_size)
            yield from _chunks(file, count)
    elif stat.S_ISFIFO(mode):
        yield entry(FIFO, name, status)
    elif not stat.S_ISSOCK(mode):  # of sockets there is nothing to carry, as tar(1) sees it too
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)


def _with_mode(status: os.stat_result, mode: int | None) -> os.stat_result:
    if mode is None:
        return status
    head = (stat.S_IFMT(status.st_mode) | mode, *status[1:])
    return os.stat_result(head, {"st_mtime_ns": status.st_mtime_ns})


def _chunks(file: BinaryIO | Special, count: Count) -> Iterator[bytes]:
    while data := file.read(CHUNK):
        count(len(data))
        yield _SIZE.pack(len(data)) + data
    yield _SIZE.pack(0)


class Unpacker:
    """Makes on this host what a guest's stream says.

    Args:
        read: gives exactly so many bytes of it, or raises.
        path: what the first entry becomes.
        max_bytes: of file data, at most.
        all_kinds: links that leave the tree and FIFOs are made, too, and modes are kept that let
            others write.
        count: called with the size in bytes of each piece of file data that has been written.
        wanted: as of `pack`, while a pipe at `path` takes nothing.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        path: str,
        max_bytes: int = MAX_BYTES,
        *,
        all_kinds: bool = False,
        count: Count = _nobody,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._wanted = wanted
        self._read = read
        self._count = count
        self._path = path
        self._max = self._left = max_bytes
        self._entries = 0
        self._all_kinds = all_kinds
        self._modes = MODES_OF_ALL if all_kinds else MODES
        self._stack: list[tuple[int, tuple[int, int, int]]] = []
        self._dir = -1

    def unpack(self) -> None:
        """Do it.

        Raises:
            AgentError: the stream is not one.
            OSError: something cannot be made here.
        """
        path = self._path
        if os.path.islink(path):  # it is the caller's own: a guest's would not be there
            path = os.path.realpath(path)
        parent, name = os.path.split(path)
        self._dir = os.open(parent or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not self._next(name):
                raise AgentError("the guest sent nothing")
            if self._stack:
                while self._next(None):
                    pass
            if self._stack or self._head()[0] != LAST:
                raise AgentError("the guest's tree does not end where it should")
        finally:
            for fd in (self._dir, *(fd for fd, _ in self._stack)):
                os.close(fd)

    def unpack_into(self, file: BinaryIO) -> None:
        """Write the one regular file there is into `file`."""
        kind, _, _, _ = self._head()
        if kind != REGULAR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self._path)
        for data in self._data():
            file.write(data)
        if self._head()[0] != LAST:
            raise AgentError("the guest's file does not end where it should")

    # --- the stream -------------------------------------------------------------------------------

    def _head(self) -> tuple[int, str, tuple[int, int, int], int]:
        """kind, name, (mode, seconds, nanoseconds), size."""
        kind, zero, size, mode, length, seconds, nanoseconds, more = ENTRY.unpack(
            self._read(ENTRY.size)
        )
        name = self._read(size) if size <= NAME_MAX else b""
        wrong = b"/" in name or b"\0" in name or name in (b".", b"..")
        if size > NAME_MAX or zero or more or wrong or nanoseconds >= NANOSECONDS:
            raise AgentError(f"the guest sent an entry that cannot be: {name!r}")
        if mode & ~0o7777 or not -(1 << 40) < seconds < 1 << 40:
            raise AgentError(f"the guest sent mode {mode:#o}, time {seconds} of {name!r}")
        return kind, os.fsdecode(name), (mode, seconds, nanoseconds), length

    def _data(self) -> Iterator[bytes]:
        while True:
            (size,) = _SIZE.unpack(self._read(4))
            if size > CHUNK:
                raise AgentError(f"the guest sent {size} bytes of a file at once")
            if not size:
                return
            self._left -= size
            if self._left < 0:
                raise AgentError(
                    f"{self._path}: the guest sends more than {self._max} bytes; max_bytes= is "
                    "the limit"
                )
            yield self._read(size)
            self._count(size)

    # --- the host's files -------------------------------------------------------------------------

    def _next(self, called: str | None) -> bool:
        """Make the next entry, the first one as `called`; False after the last one of the tree."""
        kind, name, how, size = self._head()
        self._entries += 1
        if self._entries > ENTRIES_MAX:
            raise AgentError(f"{self._path}: the guest sends more than {ENTRIES_MAX} entries")
        first = called is not None
        if called is not None:
            name = called
        if kind == UP:
            if not self._stack:
                raise AgentError("the guest's tree goes up from its root")
            self._settle(self._dir, self._stack[-1][1])
            os.close(self._dir)
            self._dir, _ = self._stack.pop()
            return bool(self._stack)
        if not name or name in (".", ".."):
            raise AgentError("the guest sent an entry without a name")
        if first and kind in (LINK, FIFO):
            # What was asked for is followed in the guest: its agent never sends one of these.
            raise AgentError(f"{self._path}: the guest sent a link or a FIFO in place of a file")
        if kind == DIRECTORY:
            self._directory(name, how, first)
        elif kind == REGULAR:
            self._file(name, how, first)
        elif kind == LINK:
            if not 0 < size <= TARGET_MAX:
                raise AgentError(f"the guest sent a link {name!r} of {size} bytes")
            target = self._read(size)
            if b"\0" in target:
                raise AgentError(f"the guest sent a link {name!r} with a NUL in it")
            if not self._all_kinds and _leaves(target, len(self._stack) - 1):
                raise OSError(
                    errno.EPERM,
                    f"it is a link to {os.fsdecode(target)!r}, outside what is copied; "
                    "filter='all' takes it all the same",
                    os.path.join(self._path, name),
                )
            self._make_way(name)
            os.symlink(target, os.fsencode(name), dir_fd=self._dir)
            self._stamp(name, how)
        elif kind == FIFO:
            if not self._all_kinds:
                raise OSError(
                    errno.EPERM,
                    "it is a FIFO, which whoever opens it waits for; filter='all' takes it",
                    os.path.join(self._path, name),
                )
            self._make_way(name)
            os.mkfifo(name, how[0] & 0o777, dir_fd=self._dir)
            self._stamp(name, how)
        else:
            raise AgentError(f"the guest sent an entry of kind {kind}")
        return True

    def _directory(self, name: str, how: tuple[int, int, int], first: bool) -> None:
        if len(self._stack) == DEPTH_MAX:
            raise AgentError(f"the guest's tree is deeper than {DEPTH_MAX}")
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=self._dir)
        follow = 0 if first else os.O_NOFOLLOW  # what the caller named may be a link
        flags = os.O_RDONLY | os.O_DIRECTORY | _FLAGS | follow
        fd = os.open(name, flags, dir_fd=self._dir)
        self._stack.append((self._dir, how))
        self._dir = fd

    def _file(self, name: str, how: tuple[int, int, int], first: bool) -> None:
        if first and self._is_special(name):
            # The caller's own device or pipe. Nobody reads a pipe: an error, and no wait.
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | _FLAGS
            fd = os.open(name, flags, dir_fd=self._dir)
            special = Special(fd, self._wanted)
            try:
                self._fill(special)
            finally:
                special.close()
            return
        new = name
        if first:
            # Whole or not at all; and whatever is put in its place meanwhile is not written to.
            new = f".{name[:50]}.{os.urandom(6).hex()}"  # at most 255 bytes, as any name
        else:
            self._make_way(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | _FLAGS
        try:
            with open(os.open(new, flags, 0o600, dir_fd=self._dir), "wb", buffering=0) as file:
                self._fill(file)
                self._settle(file.fileno(), how)
            if first:
                os.rename(new, name, src_dir_fd=self._dir, dst_dir_fd=self._dir)
        except BaseException as err:
            if first:
                self._make_way(new)
                if isinstance(err, OSError) and err.filename == new:
                    raise OSError(err.errno, err.strerror, self._path) from None
            raise

    def _is_special(self, name: str) -> bool:
        """Whether there is something called so that is neither a file nor a directory."""
        try:
            mode = os.stat(name, dir_fd=self._dir, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return False
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))

    def _fill(self, file: BinaryIO | io.FileIO | Special) -> None:
        for data in self._data():
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]

    def _settle(self, fd: int, how: tuple[int, int, int]) -> None:
        """Set mode and times of what is open."""
        os.fchmod(fd, how[0] & self._modes)
        os.utime(fd, ns=_times(how))

    def _stamp(self, name: str, how: tuple[int, int, int]) -> None:
        """Set times of what is not opened."""
        os.utime(name, ns=_times(how), dir_fd=self._dir, follow_symlinks=False)

    def _make_way(self, name: str) -> None:
        """Remove what is called so, whatever it is, if it is no directory."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._dir)


def _leaves(target: bytes, depth: int) -> bool:
    """Whether a link to `target`, `depth` directories below the top, may lead out of the tree.

    `..` counts at the beginning only: after a name, which may be another link, nobody knows where
    it leads.
    """
    if target.startswith(b"/"):
        return True
    words = [word for word in target.split(b"/") if word not in (b"", b".")]
    up = 0
    while up < len(words) and words[up] == b"..":
        up += 1
    return up > depth or b".." in words[up:]


def _times(how: tuple[int, int, int]) -> tuple[int, int]:
    """Access and modification time in nanoseconds."""
    _, seconds, nanoseconds = how
    return (min(max(seconds, TIME_MIN), TIME_MAX) * NANOSECONDS + nanoseconds,) * 2

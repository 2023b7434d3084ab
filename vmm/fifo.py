"""Writing to a FIFO (or a file) whose reader may come later, go, and come again.

open(2) for writing waits for a reader, deaf to everything but a signal with a handler that raises;
with O_NONBLOCK it fails. Linux lets one open a FIFO for both directions: with a reader of its own
for a moment, a writer is open, and what it writes stays in the pipe until somebody reads it.
"""

from __future__ import annotations

import errno
import os
import stat

from vmm.forked import drop_in_child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from io import FileIO

FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def open_output(path: str, mode: int = 0o666) -> int:
    """A descriptor to write to `path`, a new or truncated file, or a FIFO. Never waits.

    It does not block: a full pipe is a BlockingIOError. (A regular file always blocks.)
    Raises OSError.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | FLAGS, mode)
    except OSError as err:
        if err.errno != errno.ENXIO or not is_fifo(path):
            raise
        with _Reader(path):
            return os.open(path, os.O_WRONLY | FLAGS)
    return fd


def open_stored(path: str) -> FileIO:
    """Open a regular file or a block device to be read, without a buffer.

    Never waits, as open(2) of a FIFO does until it has a writer. Raises OSError, also for what has
    no end: a FIFO, a character device.
    """
    fd = os.open(path, os.O_RDONLY | FLAGS)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return open(fd, "rb", buffering=0)
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    what = "FIFO" if stat.S_ISFIFO(mode) else "character device"
    raise OSError(errno.EINVAL, f"it is a {what}, not a file", path)


def is_fifo(path: str) -> bool:
    """Whether `path` is a FIFO."""
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False


class Output:
    """A file or FIFO that is written to without waiting. Raises OSError where it cannot be opened.

    Attributes:
        fd: the descriptor.
        lost: bytes that were dropped because the FIFO was full and nobody read it.
    """

    def __init__(self, path: str) -> None:
        self.fd = open_output(path)
        self.lost = 0
        self._path = path
        drop_in_child(self)
        self.is_fifo = stat.S_ISFIFO(os.fstat(self.fd).st_mode)

    def put(self, data: bytes | memoryview) -> int:
        """How many bytes of `data` were taken.

        Into a FIFO that nobody reads, what fits is written for the next reader. Raises
        BlockingIOError where there is no room, OSError.
        """
        try:
            return os.write(self.fd, data)
        except BrokenPipeError:
            if not self.is_fifo:
                raise
            with _Reader(self._path):
                return os.write(self.fd, data)

    def write(self, data: bytes | memoryview) -> int:
        """As `put`, but what finds a full FIFO without a reader is dropped (`lost`)."""
        try:
            return self.put(data)
        except BlockingIOError:
            if not self.is_fifo or self.is_read():
                raise
            self.lost += len(data)
            return len(data)

    def is_read(self) -> bool:
        """Whether somebody has the FIFO open for reading."""
        import select

        poll = select.poll()
        poll.register(self.fd, 0)
        return not poll.poll(0)

    def close(self) -> None:
        """Close the descriptor; harmless twice. What is in a FIFO that nobody has open is lost."""
        if self.fd < 0:
            return
        if self.is_fifo and not self.is_read():
            import fcntl
            import termios

            waiting = fcntl.ioctl(self.fd, termios.FIONREAD, bytes(4))
            self.lost += int.from_bytes(waiting, "little")
        fd, self.fd = self.fd, -1
        os.close(fd)


class Records:
    """Writes records to a FIFO, each as a whole or not at all, and never waits.

    Attributes:
        dropped: records that found no room.
    """

    def __init__(self, path: str) -> None:
        self.dropped = 0
        self._out = Output(path)
        self._rest = b""

    def send(self, record: bytes) -> None:
        """Write `record`, or drop it. Raises OSError."""
        if not self.flush():
            self.dropped += 1
            return
        try:
            self._rest = record[self._out.put(record) :]
        except BlockingIOError:
            self.dropped += 1

    def flush(self) -> bool:
        """Write what is left of the last record; whether nothing is left now. Raises OSError."""
        try:
            while self._rest:
                self._rest = self._rest[self._out.put(self._rest) :]
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Close the FIFO; harmless twice."""
        self._rest = b""
        self._out.close()


class _Reader:
    """A reader of its own, for a moment."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | FLAGS)

    def __enter__(self) -> None:
        return

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

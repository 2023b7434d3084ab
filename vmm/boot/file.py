"""A file a person named, read at offsets and straight into guest memory.

Read, not mapped: a mapped file that is cut short or whose disk fails kills the process by SIGBUS,
and reading into guest memory saves the page faults on the way.
"""

from __future__ import annotations

import errno
import os
import stat

from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

_HINTS = {
    errno.ENOENT: "no such file",
    errno.EACCES: "no permission to read it",
    errno.ELOOP: "too many symbolic links",
    errno.ENOTDIR: "a part of the path is not a directory",
}


class InputFile:
    """An open, regular, non-empty file. A context manager.

    Args:
        path: its path.
        option: what it was given as (`kernel`, `--initrd`), for messages.

    Attributes:
        name: option and path, as messages begin.
        size: bytes, when it was opened.

    Raises:
        BootError: from every method; one line with the name and what is wrong.
    """

    __slots__ = ("_fd", "name", "size")

    def __init__(self, path: str, option: str) -> None:
        self.name = f"{option} {path}"
        try:
            # O_NONBLOCK: opening a FIFO must not wait for a writer.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as err:
            raise self._error(err) from None
        except ValueError:  # a NUL, or what the file system's encoding cannot say
            raise BootError(f"{option} {path!r}: not a possible file name") from None
        self._fd = fd
        status = os.fstat(fd)
        self.size = status.st_size
        wrong = None
        if stat.S_ISDIR(status.st_mode):
            wrong = "is a directory; give it a file"
        elif not stat.S_ISREG(status.st_mode):
            wrong = "is not a regular file; copy what it gives into one"
        elif not self.size:
            wrong = "is empty"
        if wrong:
            self.close()
            raise BootError(f"{self.name} {wrong}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; harmless the second time."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`; fewer only where the file ends."""
        try:
            data = os.pread(self._fd, size, offset)
            while len(data) < size:  # one call reads at most 2 GiB (read(2))
                more = os.pread(self._fd, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as err:
            raise self._error(err) from None
        return data

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes at `offset`."""
        try:
            while view:
                count = os.preadv(self._fd, [view], offset)
                if not count:
                    raise BootError(f"{self.name} became shorter while it was read")
                view = view[count:]
                offset += count
        except OSError as err:
            raise self._error(err) from None

    def _error(self, err: OSError) -> BootError:
        number = err.errno or 0
        return BootError(f"{self.name}: {_HINTS.get(number, os.strerror(number))}")


class FilePart:
    """A range of an InputFile, used as one; the file stays whose it is.

    Args:
        file: the open file.
        what: what the part is called, for messages.
        offset, size: where it is, in bytes.
    """

    __slots__ = ("_file", "_offset", "name", "size")

    def __init__(self, file: InputFile, what: str, offset: int, size: int) -> None:
        self._file = file
        self._offset = offset
        self.name = f"{what} of {file.name}"
        self.size = size

    def close(self) -> None:
        """Nothing to give back."""

    def read(self, offset: int, size: int) -> bytes:
        """As of an InputFile."""
        return self._file.read(self._offset + offset, max(0, min(size, self.size - offset)))

    def read_into(self, offset: int, view: memoryview) -> None:
        """As of an InputFile."""
        if offset + len(view) > self.size:
            raise BootError(f"{self.name} is shorter than what is read of it")
        self._file.read_into(self._offset + offset, view)

"""A snapshot's directory, opened: its files are reached below it, and are files.

Somebody else may have made the directory, and may still write to it. A name in it that is a
symbolic link, a FIFO, a device or a directory is refused, whatever it leads to; a file is looked at
once it is open, and stays the one that was looked at.
"""

from __future__ import annotations

import errno
import os
import stat

from vmm.errors import SnapshotError

FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a directory",
    stat.S_IFSOCK: "a socket",
}


class Folder:
    """The open directory `path`; closed by `close`.

    Args:
        follow: `path` itself may be a symbolic link.

    Raises:
        SnapshotError: it is no directory, or cannot be opened.
    """

    __slots__ = ("fd", "path")

    def __init__(self, path: str, *, follow: bool = True) -> None:
        self.path = path
        self.fd = -1
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            self.fd = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
        except OSError as err:
            why = "" if err.errno in (errno.ENOENT, errno.ENOTDIR) else f": {err.strerror}"
            raise SnapshotError(f"{path} is no directory of a snapshot{why}") from None

    def close(self) -> None:
        """Harmless twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def open(self, name: str, size: int | None = None) -> int:
        """A descriptor of the file `name`, to be read, of `size` bytes if that is known.

        Raises SnapshotError: it is not there, is no file, or has another size.
        """
        self.check(name, size)  # before it is opened: to open a device may do something
        try:
            fd = os.open(name, os.O_RDONLY | FLAGS, dir_fd=self.fd)
        except OSError as err:
            raise self._refused(name, err) from None
        try:
            self._check(name, os.fstat(fd), size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def check(self, name: str, size: int | None = None) -> None:
        """Look at the file `name` without opening it. Raises SnapshotError as `open` does."""
        try:
            status = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except OSError as err:
            raise self._refused(name, err) from None
        self._check(name, status, size)

    def read(self, name: str, most: int, size: int | None = None) -> bytes:
        """The contents of the file `name`. Raises SnapshotError, also where it has more than
        `most` bytes."""
        fd = self.open(name, size)
        try:
            if os.fstat(fd).st_size > most:
                raise SnapshotError(
                    f"{self.path}/{name} has more than the {most >> 20} MiB it can have"
                )
            parts = []
            while most > 0 and (part := os.read(fd, min(most, 1 << 20))):
                parts.append(part)
                most -= len(part)
            return b"".join(parts)
        except OSError as err:
            raise self._refused(name, err) from None
        finally:
            os.close(fd)

    def _check(self, name: str, status: os.stat_result, size: int | None) -> None:
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
            raise SnapshotError(
                f"{self.path}/{name} is {kind}; a snapshot has files of its own only"
            )
        if size is not None and status.st_size != size:
            raise SnapshotError(
                f"{self.path}/{name} has {status.st_size} bytes, and had {size}: it is damaged"
            )

    def _refused(self, name: str, err: OSError) -> SnapshotError:
        missing = "; the snapshot is not complete" if err.errno == errno.ENOENT else ""
        return SnapshotError(f"{self.path}/{name}: {err.strerror}{missing}")

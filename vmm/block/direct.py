"""O_DIRECT: the alignment it wants, and what to do where the guest does not keep to it."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from _thread import allocate_lock

from vmm.block import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Transfer = Callable[[Sequence[memoryview]], None]

SECTOR = 512
BLOCK = 4096
"""No disk and no file system wants more."""
BLKSSZGET = 0x1268


def alignment(fd: int) -> int:
    """What offsets and lengths of O_DIRECT transfers must be multiples of; 0: not possible.

    The kernel is asked: statx(2) since Linux 6.1, of a disk BLKSSZGET; else the most there is.
    """
    known = libc.dio_offset_align(fd)
    if known is not None:
        return known
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return int.from_bytes(fcntl.ioctl(fd, BLKSSZGET, bytes(4)), "little")
    return BLOCK


class Bounce:
    """An aligned buffer for `size` bytes at byte `offset`, wherever the guest has them.

        with Bounce(offset, size, align) as bounce:
            read([bounce.buffer], bounce.offset)
            bounce.scatter(views)

    Attributes:
        offset: aligned, at or before the one asked for.
        buffer: page-aligned, whole blocks.
        partial: there is more in it than was asked for.
    """

    def __init__(self, offset: int, size: int, align: int) -> None:
        self.offset = offset - offset % align
        end = -(-(offset + size) // align) * align
        self.partial = self.offset != offset or end != offset + size
        self._at = offset - self.offset
        self._map = mmap.mmap(-1, end - self.offset)
        self.buffer = memoryview(self._map)

    def __enter__(self) -> Bounce:
        return self

    def __exit__(self, *exc: object) -> None:
        self.buffer.release()
        self._map.close()

    def scatter(self, views: Sequence[memoryview]) -> None:
        """Copy from the buffer to `views`."""
        at = self._at
        for view in views:
            view[:] = self._map[at : at + len(view)]
            at += len(view)

    def gather(self, views: Sequence[memoryview]) -> None:
        """Copy from `views` into the buffer."""
        at = self._at
        for view in views:
            self.buffer[at : at + len(view)] = view
            at += len(view)


class Writers:
    """Writes of whole blocks go together; one that reads a block, changes a part of it and writes
    it back goes alone, as it would undo what another writes to the block meanwhile."""

    def __init__(self) -> None:
        self._turn = allocate_lock()
        self._count_lock = allocate_lock()
        self._count = 0
        self._nobody = allocate_lock()

    def together(self, write: Callable[[], None]) -> None:
        """Call `write` when no one is alone."""
        with self._turn, self._count_lock:
            self._count += 1
            if self._count == 1:
                self._nobody.acquire()
        try:
            write()
        finally:
            with self._count_lock:
                self._count -= 1
                if not self._count:
                    self._nobody.release()

    def alone(self, write: Callable[[], None]) -> None:
        """Call `write` when no other is under way."""
        with self._turn, self._nobody:
            write()

"""A disk's volatile cache: what a power cut may take back.

Writes go to the image as ever, so it holds what the guest reads. What they replaced is kept until
a flush has made them safe; a power cut puts it back, for all of them or for some. Real disks do the
same: what is in their cache reaches the medium in any order, whole or in part, or never.
"""

from __future__ import annotations

import os
from collections import deque
from threading import RLock

from vmm.block.vector import whole

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random
    from typing import TypeAlias

    from vmm.block.nbd import NbdImage
    from vmm.block.overlay import Overlay
    from vmm.block.raw import RawImage

    Image: TypeAlias = RawImage | NbdImage | Overlay
    Write = Callable[[int, bytes], object]
    """Puts bytes at an offset."""

SECTOR = 512
PIECE = 1 << 20
"""Bytes of zeroes that are one write."""
CACHE = 64 << 20
ENTRY = 256
"""Bytes that an entry without data takes: zeroes in place of zeroes."""


class Entry:
    """One write, or a piece of one. None stands for zeroes."""

    __slots__ = ("new", "offset", "old", "size")

    def __init__(self, offset: int, size: int, old: bytes | None, new: bytes | None) -> None:
        self.offset, self.size, self.old, self.new = offset, size, old, new

    def kept(self) -> int:
        """Bytes of memory it takes."""
        return (self.size if self.old else 0) + (self.size if self.new else 0) or ENTRY


class Cut:
    """What a power cut did.

    Attributes:
        lost, kept: writes since the last flush that did not, and did, reach the disk.
        torn: those of `kept` of which only a part did.
    """

    __slots__ = ("kept", "lost", "torn")

    def __init__(self) -> None:
        self.lost = self.kept = self.torn = 0

    def __repr__(self) -> str:
        return f"<power cut: {self.lost} writes lost, {self.kept} kept, {self.torn} of them torn>"


class WriteLog:
    """The writes to `image` that no flush has made safe.

    Args:
        limit: bytes of memory; beyond, the oldest writes count as safe, as a disk's cache is
            written out when it is full.

    Attributes:
        lock: held for each write; while somebody else holds it, none is made.
    """

    def __init__(self, image: Image, limit: int = CACHE) -> None:
        self.lock = RLock()
        self._image = image
        self._limit = limit
        self._entries: deque[Entry] = deque()
        self._first = 0  # the number of _entries[0]
        self._bytes = 0

    @property
    def unflushed(self) -> int:
        """Writes that are not safe."""
        return len(self._entries)

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write `views` at byte `offset`."""
        size = sum(map(len, views))
        with self.lock:
            if size > self._limit:  # no cache holds that: it and all before it are written out
                self._image.write(views, offset)
                self.forget()
                return
            new = b"".join(views)
            old = self._read(offset, len(new))
            # Before it is made: half a write that failed is undone too.
            self._add(Entry(offset, len(new), old, _or_none(new)))
            self._image.write(views, offset)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """Zeroes from byte `offset` on."""
        with self.lock:
            for at in range(offset, offset + size, PIECE):
                part = min(PIECE, offset + size - at)
                old = self._read(at, part)
                if old is not None:
                    self._add(Entry(at, part, old, None))
            self._image.write_zeroes(offset, size, unmap=unmap)

    def flush(self) -> None:
        """Make safe what was written before the call."""
        with self.lock:
            mark = self._first + len(self._entries)
        self._image.flush()
        with self.lock:
            self._forget(mark)

    def _read(self, offset: int, size: int) -> bytes | None:
        data = bytearray(size)
        with memoryview(data) as view:
            self._image.read([view], offset)
        return _or_none(bytes(data))

    def _add(self, entry: Entry) -> None:
        self._entries.append(entry)
        self._bytes += entry.kept()
        while self._bytes > self._limit:
            self._forget(self._first + 1)

    def _forget(self, mark: int) -> None:
        """Entries before number `mark` are safe."""
        while self._entries and self._first < mark:
            self._bytes -= self._entries.popleft().kept()
            self._first += 1

    # --- the power cut ----------------------------------------------------------------------------

    def cut(self, write: Write, keep: float, torn: float, chance: Random) -> Cut:
        """Make of the image's content, or of a copy's, what the power cut leaves; under `lock`.

        Args:
            write: to the image, or the copy.
            keep: the probability of each write to have reached the disk.
            torn: the probability of such a write to have done so in part: sectors are whole.
        """
        done = Cut()
        for entry in reversed(self._entries):
            write(entry.offset, entry.old or bytes(entry.size))
        for entry in self._entries:
            if chance.random() >= keep:
                done.lost += 1
                continue
            done.kept += 1
            data = entry.new or bytes(entry.size)
            if chance.random() < torn and entry.size > SECTOR:
                done.torn += 1
                for at in some_sectors(entry.size, chance):
                    write(entry.offset + at, data[at : at + SECTOR])
            else:
                write(entry.offset, data)
        return done

    def forget(self) -> None:
        """What the image holds now is safe."""
        self._forget(self._first + len(self._entries))

    def move(self, image: Image) -> None:
        """From now on it is `image` that is written to; what it holds is safe."""
        with self.lock:
            self._image = image
            self.forget()


def some_sectors(size: int, chance: Random) -> list[int]:
    """Offsets of some of the sectors of `size` bytes: at least one, and not all."""
    offsets = range(0, size, SECTOR)
    count = chance.randint(1, len(offsets) - 1)
    return sorted(chance.sample(offsets, count))


def _or_none(data: bytes) -> bytes | None:
    return data if data.strip(b"\0") else None


class FaultyImage:
    """`base`, for a disk whose faults are set.

    It says that all of its work may block, so that none is done in a queue's thread.

    Attributes:
        log: what a power cut may take back, where that is kept.
    """

    direct = True

    def __init__(self, base: Image) -> None:
        self.base = base
        self.path = base.path
        self.readonly = base.readonly
        self.log: WriteLog | None = None

    def __repr__(self) -> str:
        return f"FaultyImage({self.base!r})"

    @property
    def size(self) -> int:
        """Bytes of the image below."""
        return self.base.size

    def close(self) -> None:
        """Close the image below."""
        self.base.close()

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill `views` from byte `offset`."""
        self.base.read(views, offset)

    def read_cached(self, views: Sequence[memoryview], offset: int, size: int) -> bool:
        """Never: reads may be struck by a fault."""
        return False

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write `views` at byte `offset`."""
        (self.log or self.base).write(views, offset)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """Zeroes from byte `offset` on."""
        (self.log or self.base).write_zeroes(offset, size, unmap=unmap)

    def discard(self, offset: int, size: int) -> None:
        """As the image does; what is there afterwards may be anything, also after a power cut."""
        log = self.log
        if log is None:
            self.base.discard(offset, size)
            return
        with log.lock:
            self.base.discard(offset, size)

    def flush(self) -> None:
        """Make safe what was written."""
        (self.log or self.base).flush()


def copy(image: Image, fd: int) -> None:
    """Copy `image` to the empty file `fd`, as sparse as it can be."""
    os.truncate(fd, image.size)
    if _reflink(image, fd):
        return
    buffer = memoryview(bytearray(PIECE))
    zeroes = bytes(PIECE)
    for offset in range(0, image.size, PIECE):
        view = buffer[: min(PIECE, image.size - offset)]
        image.read([view], offset)
        if view != zeroes[: len(view)]:
            whole(os.pwritev, fd, [view], offset)


def _reflink(image: Image, fd: int) -> bool:
    """FICLONE, where the image is one file and the file system shares blocks."""
    import fcntl

    source = getattr(image, "fd", -1)
    if source < 0 or getattr(image, "is_device", False):
        return False
    try:
        fcntl.ioctl(fd, 0x40049409, source)
    except OSError:
        return False
    return True

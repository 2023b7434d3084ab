"""Guest memory: every access from the monitor to guest RAM goes through here, bounds-checked.

Objectives, in order: no address from a guest can reach outside its RAM; views instead of copies;
small typed reads and writes cost one dictionary-free Python call.
"""

from __future__ import annotations

import struct
from mmap import mmap

from vmm.errors import GuestMemoryError, UsageError
from vmm.layout import HOLE_END, HOLE_START, PAGE_SIZE
from vmm.memory.backing import map_backing
from vmm.memory.region import Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self

    from typing_extensions import Buffer

    from vmm.memory.base import Base

_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class GuestMemory:
    """The RAM of one guest: [0, 3 GiB) and, for larger guests, the rest from 4 GiB up.

    Args:
        size: bytes, a positive multiple of 4096.
        backing: see `vmm.memory.backing.map_backing`.
        path: the file under a `file-private` backing; RAM is laid in it contiguously.
        base: map this privately instead; it is shared, and let go of at the end.

    Attributes:
        base: what it is a private mapping of, or None; see `vmm.memory.base`.

    A range is valid if it lies wholly in one region; only `iov` accepts ranges that span two.
    Invalid ranges raise `GuestMemoryError`, never touch memory.

    >>> with GuestMemory(1 << 20) as memory:
    ...     memory.write_u32(0x1000, 0xCAFE)
    ...     memory.read(0x1000, 2).hex()
    'feca'
    """

    __slots__ = ("__weakref__", "_high", "_low", "at_close", "base", "leave", "regions", "size")

    def __init__(
        self,
        size: int,
        backing: str = "anonymous",
        path: str | None = None,
        *,
        base: Base | None = None,
    ) -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise UsageError(f"memory: {size} bytes is not a positive multiple of {PAGE_SIZE}")
        low = min(size, HOLE_START)
        self.size = size
        if base is not None:
            backing = "base"
        self.base = base
        self.at_close: Callable[[GuestMemory], object] | None = None
        """Called first by `close`, once."""
        self.leave: Callable[[], object] | None = None
        """What makes it independent of the files it is mapped from, where they are somebody's."""
        self._high: Region | None = None

        def mapping(number: int, size: int, offset: int) -> mmap:
            if base is not None:
                return base.map(number, size)
            return map_backing(backing, size, path=path, offset=offset)

        self._low = Region(0, mapping(0, low, 0), backing)
        if size > low:
            try:
                self._high = Region(HOLE_END, mapping(1, size - low, low), backing)
            except BaseException:
                self._low.close()
                raise
        if base is not None:
            base.share()
        self.regions: tuple[Region, ...] = (
            (self._low,) if self._high is None else (self._low, self._high)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap every region; views that are still held stay readable until they go."""
        at_close, self.at_close = self.at_close, None
        if at_close is not None:
            at_close(self)
        for region in self.regions:
            region.close()
            region.size, region.end = 0, region.gpa  # nothing is found there any more
        self.regions = ()
        base, self.base = self.base, None
        if base is not None:
            base.release()

    # --- finding ------------------------------------------------------------------------------

    def find(self, gpa: int, size: int) -> Region:
        """The region that holds [gpa, gpa+size) wholly; `GuestMemoryError` if none does."""
        low = self._low
        if size >= 0:
            if 0 <= gpa and gpa + size <= low.size:
                return low
            high = self._high
            if high is not None and high.gpa <= gpa and gpa + size <= high.end:
                return high
        if not self.regions:
            raise GuestMemoryError(gpa, size, "is gone: the memory is closed")
        raise GuestMemoryError(gpa, size)

    def contains(self, gpa: int, size: int = 1) -> bool:
        """Whether [gpa, gpa+size) is RAM within one region."""
        try:
            self.find(gpa, size)
        except GuestMemoryError:
            return False
        return True

    def hva(self, gpa: int, size: int = 1) -> int:
        """Host virtual address of `gpa`, good for `size` bytes."""
        region = self.find(gpa, size)
        return region.hva + gpa - region.gpa

    # --- bytes --------------------------------------------------------------------------------

    def view(self, gpa: int, size: int) -> memoryview:
        """A writable view of `size` bytes at `gpa`, no copy."""
        region = self.find(gpa, size)
        offset = gpa - region.gpa
        return region.data[offset : offset + size]

    def read(self, gpa: int, size: int) -> bytes:
        """A copy of `size` bytes at `gpa`."""
        region = self.find(gpa, size)
        offset = gpa - region.gpa
        return region.map[offset : offset + size]

    def write(self, gpa: int, data: Buffer) -> None:
        """Copy `data` to `gpa`."""
        source = memoryview(data).cast("B")
        size = len(source)
        region = self.find(gpa, size)
        offset = gpa - region.gpa
        region.data[offset : offset + size] = source

    def fill(self, gpa: int, size: int, byte: int = 0) -> None:
        """Set `size` bytes at `gpa` to `byte`."""
        region = self.find(gpa, size)
        offset = gpa - region.gpa
        region.data[offset : offset + size] = bytes((byte,)) * size

    def iov(self, ranges: Iterable[tuple[int, int]]) -> list[memoryview]:
        """Views of each (gpa, size), in order, for preadv(2)/pwritev(2).

        A range that runs from one region into the next (adjacent) one becomes two views. Empty
        ranges give no view. Nothing is returned unless every range is valid.
        """
        views: list[memoryview] = []
        for gpa, size in ranges:
            if size < 0:
                raise GuestMemoryError(gpa, size)
            while size:
                region = self.find(gpa, 1)
                part = min(size, region.end - gpa)
                offset = gpa - region.gpa
                views.append(region.data[offset : offset + part])
                gpa += part
                size -= part
        return views

    # --- little-endian integers ---------------------------------------------------------------

    def read_u8(self, gpa: int) -> int:
        """One byte at `gpa`."""
        region = self.find(gpa, 1)
        return region.data[gpa - region.gpa]

    def read_u16(self, gpa: int) -> int:
        """A 16-bit little-endian integer at `gpa` (any alignment, as all below)."""
        region = self.find(gpa, 2)
        value: int = _U16.unpack_from(region.data, gpa - region.gpa)[0]
        return value

    def read_u32(self, gpa: int) -> int:
        """A 32-bit integer at `gpa`."""
        region = self.find(gpa, 4)
        value: int = _U32.unpack_from(region.data, gpa - region.gpa)[0]
        return value

    def read_u64(self, gpa: int) -> int:
        """A 64-bit integer at `gpa`."""
        region = self.find(gpa, 8)
        value: int = _U64.unpack_from(region.data, gpa - region.gpa)[0]
        return value

    def write_u8(self, gpa: int, value: int) -> None:
        """Store one byte at `gpa`."""
        region = self.find(gpa, 1)
        region.data[gpa - region.gpa] = value

    def write_u16(self, gpa: int, value: int) -> None:
        """Store a 16-bit little-endian integer at `gpa`."""
        region = self.find(gpa, 2)
        _U16.pack_into(region.data, gpa - region.gpa, value)

    def write_u32(self, gpa: int, value: int) -> None:
        """Store a 32-bit integer at `gpa`."""
        region = self.find(gpa, 4)
        _U32.pack_into(region.data, gpa - region.gpa, value)

    def write_u64(self, gpa: int, value: int) -> None:
        """Store a 64-bit integer at `gpa`."""
        region = self.find(gpa, 8)
        _U64.pack_into(region.data, gpa - region.gpa, value)

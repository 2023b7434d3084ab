"""Which pages of a private file mapping are this process's own: written since it was mapped.

The first write to a page of a MAP_PRIVATE mapping makes an anonymous copy of it, whoever writes:
the guest, KVM itself, a device here by readv(2), a program by a view. So no dirty log is needed,
and no writer can be missed. /proc/self/pagemap tells such pages from those of the file: by the
PAGEMAP_SCAN ioctl (Linux 6.7) without looking at what was never touched, else by reading it.

Source: Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from vmm.layout import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

Runs = list[tuple[int, int]]
"""(first byte, length in bytes) of runs of pages, in order, relative to the mapping's begin."""

PAGEMAP_SCAN = 0xC0606610
_SCAN_ARG = struct.Struct("<12Q")
_REGION = struct.Struct("<QQQ")
PAGE_IS_FILE, PAGE_IS_PRESENT, PAGE_IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
VECTOR = 4096
"""Runs that one ioctl tells of."""

_READ_PAGES = 1 << 17
"""Entries read at a time, where pagemap is read: 1 MiB of them."""
# The top byte of an entry: bit 63 present, 62 swapped, 61 of a file or shared.
_PRIVATE = bytes(int(top & 0xC0 != 0 and not top & 0x20) for top in range(256))


class Pagemap:
    """This process's page tables; open while a machine may be rolled back.

    Args:
        scan: False leaves PAGEMAP_SCAN out, as on kernels before 6.7.
    """

    def __init__(self, *, scan: bool = True) -> None:
        self._fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._scan = scan

    def close(self) -> None:
        """Harmless twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def private(self, address: int, size: int) -> Runs:
        """The anonymous pages in the `size` bytes mapped at `address`, in swap or not."""
        if self._scan:
            try:
                return self._scanned(address, size)
            except OSError as err:
                if err.errno not in (errno.ENOTTY, errno.EINVAL):
                    raise
                self._scan = False
        return list(self._read(address, size))

    def _scanned(self, address: int, size: int) -> Runs:
        from vmm.kvm.ffi import address_of

        runs: Runs = []
        found = bytearray(VECTOR * _REGION.size)
        vector = address_of(found)
        start, end = address, address + size
        while start < end:
            argument = bytearray(
                _SCAN_ARG.pack(
                    _SCAN_ARG.size, 0, start, end, 0, vector, VECTOR, 0,
                    PAGE_IS_FILE, PAGE_IS_FILE, PAGE_IS_PRESENT | PAGE_IS_SWAPPED, PAGE_IS_FILE,
                )
            )  # fmt: skip
            count = fcntl.ioctl(self._fd, PAGEMAP_SCAN, argument)
            last = end
            for first, last, _ in _REGION.iter_unpack(memoryview(found)[: count * _REGION.size]):
                runs.append((first - address, last - first))
            # Not from `walk_end`: where there were more than 512 runs, kernels (6.18) leave in it
            # where they last emptied a buffer of their own.
            start = last if count == VECTOR else end
        return runs

    def _read(self, address: int, size: int) -> Iterator[tuple[int, int]]:
        pages = size // PAGE_SIZE
        for done in range(0, pages, _READ_PAGES):
            count = min(_READ_PAGES, pages - done)
            entries = os.pread(self._fd, count * 8, (address // PAGE_SIZE + done) * 8)
            private = entries[7::8].translate(_PRIVATE)
            first = private.find(1)
            while first >= 0:
                last = private.find(0, first)
                if last < 0:
                    last = count
                yield (done + first) * PAGE_SIZE, (last - first) * PAGE_SIZE
                first = private.find(1, last)

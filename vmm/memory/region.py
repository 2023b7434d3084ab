"""A region: one run of guest physical addresses over one host mapping."""

from __future__ import annotations

import mmap

from vmm.kvm.ffi import address_of
from vmm.layout import PAGE_SIZE


class Region:
    """Guest RAM from GPA `gpa`, `size` bytes, at host virtual address `hva`.

    Attributes:
        gpa: first guest physical address, bytes.
        end: first address after it.
        size: length in bytes, a multiple of the page size.
        hva: host virtual address of the first byte, for KVM_SET_USER_MEMORY_REGION.
        map: the mapping itself, for what wants the buffer protocol.
        fd: the memfd behind it, or -1.
        kind: the name of its backing (see `vmm.memory.backing`).
    """

    __slots__ = ("data", "end", "fd", "gpa", "hva", "kind", "map", "size")

    def __init__(self, gpa: int, mapping: mmap.mmap, kind: str) -> None:
        self.gpa = gpa
        self.fd: int = getattr(mapping, "fd", -1)
        self.map = mapping
        self.kind = kind
        self.size = len(mapping)
        self.end = gpa + self.size
        self.hva = address_of(mapping)
        self.data = memoryview(mapping)

    def __repr__(self) -> str:
        return f"Region({self.gpa:#x}..{self.end - 1:#x}, {self.kind})"

    def close(self) -> bool:
        """Unmap. Returns False if a view is still held somewhere.

        The mapping then goes when the last view does; its pages are given back now, where the
        backing is private (a shared memfd may still be in use by another process).
        """
        self.data.release()
        try:
            self.map.close()
        except BufferError:
            if self.kind not in ("memfd", "hugetlbfs"):
                self.map.madvise(mmap.MADV_DONTNEED)
            return False
        return True

    def prefer_huge_pages(self) -> None:
        """Have the host use 2 MiB pages where it can (transparent ones; private memory only).

        What devices copy, and what the guest touches, then costs fewer faults and look-ups.
        """
        if self.kind == "anonymous":
            try:
                self.map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # EINVAL: this host's kernel knows none
                return

    def discard(self, offset: int, size: int) -> int:
        """Give the host the whole pages within [offset, offset+size) back; how many bytes.

        They read as zeroes then (of a file mapping: as the file), and cost memory again once they
        are touched. madvise(2): DONTNEED for private pages, REMOVE for those of a memfd.
        """
        page = 2 << 20 if self.kind == "hugetlbfs" else PAGE_SIZE
        low = (max(offset, 0) + page - 1) & -page
        high = min(offset + size, self.size) & -page
        if low >= high:
            return 0
        shared = self.kind in ("memfd", "hugetlbfs")
        self.map.madvise(mmap.MADV_REMOVE if shared else mmap.MADV_DONTNEED, low, high - low)
        return high - low

    def resident(self) -> int:
        """Bytes of this region that occupy host memory now (the present bits of pagemap).

        Source: Documentation/admin-guide/mm/pagemap.rst: 64 bits a page, bit 63 present.
        """
        pages = 0
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(self.hva // PAGE_SIZE * 8)
            left = self.size // PAGE_SIZE * 8
            while left:
                entries = pagemap.read(min(left, 1 << 20))
                if not entries:
                    break
                left -= len(entries)
                top = entries[7::8]  # little endian: the byte with bit 63
                pages += len(top) - len(top.translate(None, _PRESENT))
        return pages * PAGE_SIZE


_PRESENT = bytes(range(0x80, 0x100))

"""vmm.boot.e820: the memory map, for guests of any size."""

from __future__ import annotations

from itertools import pairwise

import pytest

from vmm import layout
from vmm.boot.e820 import E820_RAM, E820_RESERVED, memory_map
from vmm.layout import GIB, MIB
from vmm.memory import GuestMemory


@pytest.mark.parametrize("size", [2 * MIB, 128 * MIB, 3 * GIB, 3 * GIB + 4096, 5 * GIB, 64 * GIB])
def test_ram_is_all_there_and_nothing_overlaps(size: int) -> None:
    with GuestMemory(size) as memory:
        entries = memory_map(memory)
        assert all(length > 0 for _, length, _ in entries)
        for (start, length, _), (following, _, _) in pairwise(entries):
            assert start + length <= following
        ram = [(start, length) for start, length, kind in entries if kind == E820_RAM]
        assert all(memory.contains(start, length) for start, length in ram)
        # All but the legacy area between the EBDA and 1 MiB.
        assert sum(length for _, length in ram) == size - (layout.HIGH_RAM - layout.EBDA)


def test_what_is_not_for_the_guest_is_reserved() -> None:
    with GuestMemory(5 * GIB) as memory:
        reserved = [entry[:2] for entry in memory_map(memory) if entry[2] == E820_RESERVED]
    for gpa in (layout.EBDA, layout.BIOS_ROM, 0xFFFFF, layout.ECAM_BASE, layout.TSS, 0xFFFBF000):
        assert any(start <= gpa < start + length for start, length in reserved), hex(gpa)
    for gpa in (layout.VIRTIO_MMIO_BASE, layout.IOAPIC, layout.LAPIC, layout.HIGH_RAM, 4 * GIB):
        assert not any(start <= gpa < start + length for start, length in reserved), hex(gpa)

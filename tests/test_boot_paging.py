"""vmm.boot.paging: the tables, walked as a processor walks them."""

from __future__ import annotations

import pytest

from vmm import layout
from vmm.boot.paging import CODE_32, CODE_64, write_gdt, write_page_tables
from vmm.layout import GIB, MIB
from vmm.memory import GuestMemory


def walk(memory: GuestMemory, cr3: int, address: int) -> int | None:
    """The physical address of a linear one (Intel SDM volume 3, section 4.5), or None."""
    table = cr3
    for shift in (39, 30, 21):
        entry = memory.read_u64(table + 8 * (address >> shift & 0x1FF))
        if not entry & 1:
            return None
        assert entry & 2, "writable"
        if entry & 0x80:
            assert shift == 21
            return (entry & ~0x1FFFFF) + (address & 0x1FFFFF)
        table = entry & ~0xFFF
    raise AssertionError("a page of 4 KiB")


def test_identity_up_to_4_gib() -> None:
    with GuestMemory(2 * MIB) as memory:
        cr3 = write_page_tables(memory)
        for address in range(0, 4 * GIB, 2 * MIB):
            assert walk(memory, cr3, address + 0x1234) == address + 0x1234
        assert walk(memory, cr3, 4 * GIB) is None
        assert walk(memory, cr3, 1 << 40) is None
        # Nothing but the six tables was written.
        assert memory.read(0, layout.PML4) == bytes(layout.PML4)
        end = layout.PML4 + 0x6000
        assert memory.read(end, 2 * MIB - end) == bytes(2 * MIB - end)


@pytest.mark.parametrize(("code", "long", "size"), [(CODE_64, 1, 0), (CODE_32, 0, 1)])
def test_gdt(code: int, long: int, size: int) -> None:
    with GuestMemory(MIB) as memory:
        write_gdt(memory, code)
        gdt = [memory.read_u64(layout.GDT + 8 * i) for i in range(4)]
    assert gdt[:2] == [0, 0]
    for descriptor in gdt[2:]:
        assert descriptor & 0xFFFF == 0xFFFF and descriptor >> 48 & 0xF == 0xF  # limit 4 GiB
        assert descriptor >> 16 & 0xFFFFFF == 0 and descriptor >> 56 == 0  # base 0
        assert descriptor >> 55 & 1  # in pages
        assert descriptor >> 47 & 1 and descriptor >> 44 & 1  # present, code or data
    assert gdt[2] >> 40 & 0xF == 0xB and gdt[3] >> 40 & 0xF == 0x3
    assert (gdt[2] >> 53 & 1, gdt[2] >> 54 & 1) == (long, size)

"""What the boot protocols expect to find set up: a flat GDT and, for long mode, identity tables."""

from __future__ import annotations

import struct

from vmm import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory

CODE_64 = 0x00AF9B000000FFFF
CODE_32 = 0x00CF9B000000FFFF
DATA = 0x00CF93000000FFFF
"""Flat segment descriptors (Intel SDM volume 3, section 3.4.5)."""
_TABLE = 0x3  # present, writable
_LARGE_PAGE = 0x83  # the same, 2 MiB


def write_gdt(memory: GuestMemory, code: int) -> None:
    """Put a GDT at layout.GDT: `code` as 0x10 (__BOOT_CS), data as 0x18 (__BOOT_DS)."""
    memory.write(layout.GDT, struct.pack("<4Q", 0, 0, code, DATA))


def write_page_tables(memory: GuestMemory) -> int:
    """Identity-map the first 4 GiB with 2 MiB pages; returns CR3.

    Kernel, zero page and command line lie below 4 GiB, and Linux builds its own tables from there.
    """
    pdpt = layout.PML4 + 0x1000
    directories = pdpt + 0x1000
    memory.write_u64(layout.PML4, pdpt | _TABLE)
    for i in range(4):
        memory.write_u64(pdpt + 8 * i, directories + 0x1000 * i | _TABLE)
    entries = range(_LARGE_PAGE, 4 * layout.GIB, 2 * layout.MIB)
    memory.write(directories, struct.pack("<2048Q", *entries))
    return layout.PML4

"""struct boot_params, the "zero page" (Documentation/arch/x86/zero-page.rst)."""

from __future__ import annotations

import struct

from vmm import layout
from vmm.boot.e820 import memory_map

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory

ACPI_RSDP_ADDR = 0x070
EXT_RAMDISK_IMAGE = 0x0C0
EXT_RAMDISK_SIZE = 0x0C4
E820_ENTRIES = 0x1E8
SETUP_HEADER = 0x1F1
BOOT_FLAG = 0x1FE
HEADER = 0x202
TYPE_OF_LOADER = 0x210
LOADFLAGS = 0x211
RAMDISK_IMAGE = 0x218
RAMDISK_SIZE = 0x21C
CMD_LINE_PTR = 0x228
INITRD_ADDR_MAX = 0x22C
KERNEL_ALIGNMENT = 0x230
CMDLINE_SIZE = 0x238
E820_TABLE = 0x2D0

LOADER_UNDEFINED = 0xFF
LOADED_HIGH = 1
_E820_ENTRY = struct.Struct("<QQI")


def write_zero_page(
    memory: GuestMemory,
    *,
    header: bytes | memoryview | None,
    initrd: tuple[int, int],
    rsdp: int | None,
) -> int:
    """Write the zero page to layout.ZERO_PAGE and return that address.

    Args:
        header: a bzImage's setup header from offset 0x1f1; None for an ELF kernel, which gets
            the fields Linux looks at.
        initrd: GPA and size in bytes; size 0 for none.
        rsdp: GPA of the ACPI RSDP, or None.
    """
    page = bytearray(layout.PAGE_SIZE)
    if header is not None:
        page[SETUP_HEADER : SETUP_HEADER + len(header)] = header
    else:
        struct.pack_into("<H", page, BOOT_FLAG, 0xAA55)
        page[HEADER : HEADER + 4] = b"HdrS"
        struct.pack_into("<H", page, 0x206, 0x020F)
        struct.pack_into("<I", page, KERNEL_ALIGNMENT, 0x200000)
        struct.pack_into("<I", page, INITRD_ADDR_MAX, 0x7FFFFFFF)
        struct.pack_into("<I", page, CMDLINE_SIZE, 2047)
    page[TYPE_OF_LOADER] = LOADER_UNDEFINED
    page[LOADFLAGS] |= LOADED_HIGH
    struct.pack_into("<I", page, CMD_LINE_PTR, layout.CMDLINE)
    if initrd[1]:
        struct.pack_into("<II", page, RAMDISK_IMAGE, initrd[0] & 0xFFFFFFFF, initrd[1] & 0xFFFFFFFF)
        struct.pack_into("<II", page, EXT_RAMDISK_IMAGE, initrd[0] >> 32, initrd[1] >> 32)
    if rsdp is not None:
        struct.pack_into("<Q", page, ACPI_RSDP_ADDR, rsdp)
    entries = memory_map(memory)
    page[E820_ENTRIES] = len(entries)
    for i, entry in enumerate(entries):
        _E820_ENTRY.pack_into(page, E820_TABLE + i * _E820_ENTRY.size, *entry)
    memory.write(layout.ZERO_PAGE, page)
    return layout.ZERO_PAGE

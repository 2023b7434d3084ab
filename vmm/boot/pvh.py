"""PVH start info, version 1 (Xen's public/arch-x86/hvm/start_info.h)."""

from __future__ import annotations

import struct

from vmm import layout
from vmm.boot.e820 import memory_map

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory

XEN_HVM_START_MAGIC_VALUE = 0x336EC578
_START_INFO = struct.Struct("<IIIIQQQQII")
_MODLIST_ENTRY = struct.Struct("<QQQQ")
_MEMMAP_ENTRY = struct.Struct("<QQII")


def write_start_info(memory: GuestMemory, *, initrd: tuple[int, int], rsdp: int | None) -> int:
    """Write hvm_start_info, module list and memory map; the GPA for ebx.

    Args:
        initrd: GPA and size in bytes; size 0 for none. It becomes the first module.
        rsdp: GPA of the ACPI RSDP, or None.
    """
    entries = memory_map(memory)
    memory.write(
        layout.PVH_START_INFO,
        _START_INFO.pack(
            XEN_HVM_START_MAGIC_VALUE,
            1,  # version
            0,  # flags
            1 if initrd[1] else 0,  # nr_modules
            layout.PVH_MODLIST if initrd[1] else 0,
            layout.CMDLINE,
            rsdp or 0,
            layout.PVH_MEMMAP,
            len(entries),
            0,
        ),
    )
    if initrd[1]:
        memory.write(layout.PVH_MODLIST, _MODLIST_ENTRY.pack(initrd[0], initrd[1], 0, 0))
    table = b"".join(_MEMMAP_ENTRY.pack(*entry, 0) for entry in entries)
    memory.write(layout.PVH_MEMMAP, table)
    return layout.PVH_START_INFO

"""The memory map a guest is told of, for the zero page and for PVH alike."""

from __future__ import annotations

from vmm import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory

E820_RAM = 1
E820_RESERVED = 2
"""Types of ACPI 6.5, table 15.374 (AddressRangeMemory, AddressRangeReserved)."""


def memory_map(memory: GuestMemory) -> list[tuple[int, int, int]]:
    """(GPA, bytes, type), ascending: RAM around the legacy area and the 32-bit hole.

    Reserved are the EBDA, the BIOS area (ACPI or MP tables), PCI's ECAM window, which Linux
    uses only if it is (PCI Firmware Specification 3.3, section 4.1.2), and the four pages KVM keeps
    for real mode on Intel, where nothing else may be put.
    """
    entries = [
        (0, layout.EBDA, E820_RAM),
        (layout.EBDA, 0xA0000 - layout.EBDA, E820_RESERVED),
        (layout.BIOS_ROM, layout.HIGH_RAM - layout.BIOS_ROM, E820_RESERVED),
    ]
    for region in memory.regions:
        start = max(region.gpa, layout.HIGH_RAM)
        if start < region.end:
            entries.append((start, region.end - start, E820_RAM))
    entries.append((layout.ECAM_BASE, layout.ECAM_SIZE, E820_RESERVED))
    entries.append((layout.IDENTITY_MAP, 4 * layout.PAGE_SIZE, E820_RESERVED))
    entries.sort()
    return entries

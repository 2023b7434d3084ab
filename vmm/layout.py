"""Where things are in a guest's physical address space and on its interrupt controllers.

Addresses are GPAs in bytes. The map is a PC's: RAM from 0, a hole below 4 GiB for devices, the
rest of RAM from 4 GiB up.
"""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE_SIZE = 4096

# --- low memory, written by the boot loaders and tables -------------------------------------
GDT = 0x500
PVH_START_INFO = 0x6000
PVH_MEMMAP = 0x6100
PVH_MODLIST = 0x6080
ZERO_PAGE = 0x7000
BOOT_STACK = 0x8FF0
PML4 = 0x9000
"""Boot page tables: PML4, PDPT at 0xa000, four page directories from 0xb000 (4 GiB)."""
CMDLINE = 0x20000
CMDLINE_MAX = 0x10000
EBDA = 0x9FC00
"""End of usable low RAM: 1 KiB up to 640 KiB where a PC's firmware keeps data."""
BIOS_ROM = 0xE0000
"""ACPI tables: RSDP first, on a 16-byte boundary, as ACPI 6.5 section 5.2.5.1 wants it found."""
MP_TABLE = 0xF0000
"""The MP table's floating pointer: the third of the places where an operating system looks for it
(MP spec 1.4, section 4). The others are of 1 KiB, without room for more than 40 processors."""
VMGENID = 0xFF000
"""The VM generation ID, in a page of its own at the end of the BIOS area."""
VMGENID_SIZE = 16
HIGH_RAM = 0x100000

# --- the hole ---------------------------------------------------------------------------------
HOLE_START = 0xC0000000
HOLE_END = 0x100000000
VIRTIO_MMIO_BASE = 0xD0000000
VIRTIO_MMIO_STRIDE = 0x1000
PCI_MMIO32_BASE = 0xC0000000
PCI_MMIO32_SIZE = 0x10000000
ECAM_BASE = 0xE0000000
ECAM_SIZE = MIB
"""One bus. Linux looks for host bridges on each bus the MCFG table has room for, by ports: with 256
that is 16,000 exits (pcibios_fixup_peer_bridges, arch/x86/pci/legacy.c)."""
IOAPIC = 0xFEC00000
LAPIC = 0xFEE00000
TSS = 0xFFFBD000
"""KVM_SET_TSS_ADDR: three pages Intel's real-mode emulation uses."""
IDENTITY_MAP = 0xFFFBC000

# --- ports ------------------------------------------------------------------------------------
PORT_UART = 0x3F8
PORT_RTC = 0x70
PORT_I8042 = 0x60
PORT_PIT = 0x40
PORT_SPEAKER = 0x61
"""Gate of the i8254's third counter, and the speaker."""
PORT_PCI = 0xCF8
"""CONFIG_ADDRESS and CONFIG_DATA, 4 ports each."""
PORT_EXIT = 0xF4
PORT_PVPANIC = 0x505
PORT_ACPI = 0x600
"""ACPI block, 8 ports: sleep control, sleep status, reset, -, GED selector (32 bits)."""

# --- interrupts (GSIs) ----------------------------------------------------------------------------
IOAPIC_PINS = 24
GSI_UART = 4
GSI_RTC = 8
GSI_GED = 9
GSI_VIRTIO = (16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11)
"""GSIs of the virtio devices over MMIO, in the order in which devices take them."""
GSI_VIRTIO_LOW = (5, 6, 7, 10, 11, 16, 17, 18, 19, 20, 21, 22, 23)
"""The order without ACPI: a kernel that reads no MP table either has the PICs' 16 lines alone."""

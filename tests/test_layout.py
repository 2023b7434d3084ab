"""vmm/layout.py: nothing lies on anything else."""

from __future__ import annotations

from itertools import pairwise

import pytest

from vmm import layout

PAGE = layout.PAGE_SIZE
LOW = {
    "GDT": (layout.GDT, 0x100),
    "PVH_START_INFO": (layout.PVH_START_INFO, 0x80),
    "PVH_MODLIST": (layout.PVH_MODLIST, 0x80),
    "PVH_MEMMAP": (layout.PVH_MEMMAP, 0x800),
    "ZERO_PAGE": (layout.ZERO_PAGE, PAGE),
    "BOOT_STACK": (layout.BOOT_STACK - 0x800, 0x800),
    "PML4": (layout.PML4, 6 * PAGE),
    "CMDLINE": (layout.CMDLINE, layout.CMDLINE_MAX),
    "EBDA": (layout.EBDA, 0x400),
    "BIOS_ROM": (layout.BIOS_ROM, layout.MP_TABLE - layout.BIOS_ROM),
    "MP_TABLE": (layout.MP_TABLE, layout.HIGH_RAM - layout.MP_TABLE),
}
HOLE = {
    "PCI_MMIO32": (layout.PCI_MMIO32_BASE, layout.PCI_MMIO32_SIZE),
    "VIRTIO_MMIO": (layout.VIRTIO_MMIO_BASE, 256 * layout.VIRTIO_MMIO_STRIDE),
    "ECAM": (layout.ECAM_BASE, layout.ECAM_SIZE),
    "IOAPIC": (layout.IOAPIC, PAGE),
    "LAPIC": (layout.LAPIC, PAGE),
    "IDENTITY_MAP": (layout.IDENTITY_MAP, PAGE),
    "TSS": (layout.TSS, 3 * PAGE),
}
PORTS = {
    "RTC": (layout.PORT_RTC, 2),
    "I8042 data": (layout.PORT_I8042, 1),
    "SPEAKER": (layout.PORT_SPEAKER, 1),
    "I8042 command": (layout.PORT_I8042 + 4, 1),
    "PIC 1": (0x20, 2),
    "PIT": (layout.PORT_PIT, 4),
    "PIC 2": (0xA0, 2),
    "ELCR": (0x4D0, 2),
    "EXIT": (layout.PORT_EXIT, 1),
    "UART": (layout.PORT_UART, 8),
    "PVPANIC": (layout.PORT_PVPANIC, 1),
    "ACPI": (layout.PORT_ACPI, 8),
    "PCI configuration": (0xCF8, 8),
}


@pytest.mark.parametrize(
    ("places", "start", "end"),
    [
        (LOW, 0x500, layout.HIGH_RAM),  # below are the interrupt vectors and the BIOS's data
        (HOLE, layout.HOLE_START, layout.HOLE_END),
        (PORTS, 0, 0x10000),
    ],
    ids=["low memory", "hole", "ports"],
)
def test_nothing_overlaps(places: dict[str, tuple[int, int]], start: int, end: int) -> None:
    ordered = sorted(places.items(), key=lambda item: item[1])
    assert ordered[0][1][0] >= start
    assert sum(ordered[-1][1]) <= end
    for (name, (at, size)), (other, (next_at, _)) in pairwise(ordered):
        assert at + size <= next_at, f"{name} reaches into {other}"


def test_interrupts_are_each_of_one_device() -> None:
    own = [layout.GSI_UART, layout.GSI_RTC, layout.GSI_GED]
    lines = own + list(layout.GSI_VIRTIO)
    assert len(set(lines)) == len(lines)
    assert sorted(layout.GSI_VIRTIO_LOW) == sorted(layout.GSI_VIRTIO)
    assert max(lines) < layout.IOAPIC_PINS
    # 0 to 3 are timer, keyboard, cascade and COM2; 12 to 15 mouse, FPU and disks of a PC.
    assert not set(lines) & {0, 1, 2, 3, 12, 13, 14, 15}


def test_devices_and_gsis_are_aligned() -> None:
    for gpa, size in HOLE.values():
        assert gpa % PAGE == size % PAGE == 0
    assert layout.TSS == layout.IDENTITY_MAP + PAGE
    assert layout.ECAM_BASE % layout.ECAM_SIZE == 0  # PCI Firmware Specification 3.3, 4.1.3

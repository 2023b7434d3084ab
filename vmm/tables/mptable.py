"""The MP table (Intel MultiProcessor Specification 1.4), for kernels without ACPI.

A kernel with ACPI uses the MADT, but a Linux that can read MP tables (CONFIG_X86_MPPARSE) looks for
one all the same: in all of the 64 KiB below 1 MiB if there is none, with 4,096 mappings of what is
left of them (smp_scan_config, arch/x86/kernel/mpparse.c). Finding one at the start ends that.
"""

from __future__ import annotations

import struct

from vmm import layout
from vmm.errors import UsageError

MP_SPEC_1_4 = 4
PROCESSOR, BUS, IOAPIC, IO_INTERRUPT, LOCAL_INTERRUPT = range(5)
INT, NMI, _SMI, EXTINT = range(4)
CPU_ENABLED, CPU_BOOTSTRAP = 1, 2
CPU_SIGNATURE = 0x600
CPU_FPU_APIC = 0x201
APIC_VERSION = 0x14
MAX_CPUS = 254
"""Ids have 8 bits: 255 is for broadcasts, and the IOAPIC takes the one after the processors'."""


def build(cpus: int) -> tuple[int, bytes]:
    """Where to write, layout.MP_TABLE, and the floating pointer with the table behind it.

    All pins of the IOAPIC are ISA interrupts of the same number, as KVM's default routing has it:
    edge-triggered and active high. A Linux without ACPI knows no interrupt that no entry names
    (setup_IO_APIC_irqs(), arch/x86/kernel/apic/io_apic.c).

    Raises:
        UsageError: more processors than MAX_CPUS.
    """
    if cpus > MAX_CPUS:
        raise UsageError(f"an MP table holds at most {MAX_CPUS} processors, not {cpus}")
    gpa = layout.MP_TABLE
    entries = []
    for cpu in range(cpus):
        flags = CPU_ENABLED | (CPU_BOOTSTRAP if cpu == 0 else 0)
        entries.append(
            struct.pack(
                "<BBBBII8x", PROCESSOR, cpu, APIC_VERSION, flags, CPU_SIGNATURE, CPU_FPU_APIC
            )
        )
    ioapic_id = cpus
    entries.append(struct.pack("<BB6s", BUS, 0, b"ISA   "))
    entries.append(struct.pack("<BBBBI", IOAPIC, ioapic_id, 0x11, 1, layout.IOAPIC))
    for irq in range(layout.IOAPIC_PINS):
        entries.append(struct.pack("<BBHBBBB", IO_INTERRUPT, INT, 0, 0, irq, ioapic_id, irq))
    entries.append(struct.pack("<BBHBBBB", LOCAL_INTERRUPT, EXTINT, 0, 0, 0, 0, 0))
    entries.append(struct.pack("<BBHBBBB", LOCAL_INTERRUPT, NMI, 0, 0, 0, 0xFF, 1))
    body = b"".join(entries)
    table = bytearray(
        struct.pack(
            "<4sHBB8s12sIHHIHBx",
            b"PCMP",
            44 + len(body),
            MP_SPEC_1_4,
            0,
            b"VMM     ",
            b"MICROVM     ",
            0,
            0,
            len(entries),
            layout.LAPIC,
            0,
            0,
        )
        + body
    )
    table[7] = -sum(table) & 0xFF
    pointer = bytearray(struct.pack("<4sIBBB5x", b"_MP_", gpa + 16, 1, MP_SPEC_1_4, 0))
    pointer[10] = -sum(pointer) & 0xFF
    return gpa, bytes(pointer + table)

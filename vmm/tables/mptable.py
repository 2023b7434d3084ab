"""The MP table (Intel MultiProcessor Specification 1.4), for kernels without ACPI."""

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
ISA_IRQS = 16


def build(cpus: int) -> tuple[int, bytes]:
    """The floating pointer and the table behind it, and the GPA they go to: layout.EBDA.

    ISA interrupts go to the IOAPIC pin of the same number, as KVM's default routing has it.

    Raises:
        UsageError: over 40 processors do not fit below 0xa0000.
    """
    gpa = layout.EBDA
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
    for irq in range(ISA_IRQS):
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
    if gpa + 16 + len(table) > 0xA0000:
        raise UsageError(f"--no-acpi: an MP table holds at most 40 processors, not {cpus}")
    return gpa, bytes(pointer + table)

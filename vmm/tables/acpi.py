"""ACPI tables for a hardware-reduced machine (ACPI 6.5, sections 4.1 and 5.2).

The power block at layout.PORT_ACPI has the sleep and reset registers; the power button comes
through a generic event device (ACPI0013). Devices drive their lines edge-triggered, active high,
as they are declared here.
"""

from __future__ import annotations

import struct

from vmm import layout
from vmm.devices.power import GED_GENERATION, GED_POWER_BUTTON, RESET_VALUE, S5
from vmm.tables import aml

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

OEM_ID = b"VMM   "
OEM_TABLE_ID = b"VMMACPI "
CREATOR_ID = b"VMM "

# FADT (section 5.2.9): flags, boot architecture flags, preferred profile.
HW_REDUCED_ACPI = 1 << 20
RESET_REG_SUP = 1 << 10
PWR_BUTTON = 1 << 4
SLP_BUTTON = 1 << 5
WBINVD = 1 << 0
LEGACY_DEVICES = 1 << 0
VGA_NOT_PRESENT = 1 << 2
ENTERPRISE_SERVER = 4

# MADT (section 5.2.12)
LAPIC_ENABLED = 1
PCAT_COMPAT = 1


class AcpiConfig:
    """What the tables tell of.

    Args:
        cpus: how many processors, APIC ids 0 to cpus - 1.
        virtio_mmio: (GPA, bytes, GSI) of each virtio-mmio device.
        pci: a host bridge with ECAM at layout.ECAM_BASE.
    """

    __slots__ = ("cpus", "pci", "virtio_mmio")

    def __init__(
        self,
        cpus: int,
        virtio_mmio: Sequence[tuple[int, int, int]] = (),
        pci: bool = False,
    ) -> None:
        self.cpus = cpus
        self.virtio_mmio = tuple(virtio_mmio)
        self.pci = pci


class AcpiTables:
    """Finished tables: `rsdp` is the RSDP's GPA, `blobs` what to write where, `tables` each by
    its signature."""

    __slots__ = ("blobs", "rsdp", "tables")

    def __init__(self, rsdp: int, blobs: list[tuple[int, bytes]], tables: dict[str, bytes]) -> None:
        self.rsdp = rsdp
        self.blobs = blobs
        self.tables = tables


def build(config: AcpiConfig) -> AcpiTables:
    """Build all tables, placed from layout.BIOS_ROM; the RSDP comes first.

    Raises:
        ValueError: they do not fit below layout.MP_TABLE (those of 4,500 processors do).
    """
    rsdp_gpa = layout.BIOS_ROM
    at = rsdp_gpa + 64
    blobs: list[tuple[int, bytes]] = []
    tables: dict[str, bytes] = {}

    def place(data: bytes) -> int:
        nonlocal at
        gpa = at
        at = at + len(data) + 15 & ~15
        if at > layout.MP_TABLE:
            raise ValueError(
                f"ACPI tables for {config.cpus} processors do not fit below the MP table"
            )
        blobs.append((gpa, data))
        tables[data[:4].decode()] = data
        return gpa

    dsdt_gpa = place(dsdt(config))
    pointers = [place(fadt(dsdt_gpa)), place(madt(config))]
    if config.pci:
        pointers.append(place(mcfg()))
    xsdt_gpa = place(table("XSDT", 1, struct.pack(f"<{len(pointers)}Q", *pointers)))
    root = rsdp(xsdt_gpa)
    blobs.append((rsdp_gpa, root))
    tables["RSDP"] = root
    return AcpiTables(rsdp_gpa, blobs, tables)


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of all bytes 0 modulo 256."""
    return -sum(data) & 0xFF


def table(signature: str, revision: int, body: bytes) -> bytes:
    """A system description table: the 36-byte header (section 5.2.6) and `body`."""
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        signature.encode(),
        36 + len(body),
        revision,
        0,
        OEM_ID,
        OEM_TABLE_ID,
        1,
        CREATOR_ID,
        1,
    )
    data = bytearray(header + body)
    data[9] = checksum(data)
    return bytes(data)


def rsdp(xsdt: int) -> bytes:
    """The root pointer, revision 2 (section 5.2.5.3)."""
    data = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, 0, 36, xsdt, 0))
    data[8] = checksum(data[:20])
    data[32] = checksum(data)
    return bytes(data)


def _gas(port: int, width: int) -> bytes:
    """Generic Address Structure in I/O space (section 5.2.3.2), byte access."""
    return struct.pack("<BBBBQ", aml.SYSTEM_IO, width, 0, 1, port)


def fadt(dsdt_gpa: int) -> bytes:
    """FADT, revision 6.5, 276 bytes."""
    body = bytearray(276 - 36)

    def put(offset: int, form: str, *values: int | bytes) -> None:
        struct.pack_into(form, body, offset - 36, *values)

    put(40, "<I", dsdt_gpa)
    put(45, "<B", ENTERPRISE_SERVER)
    put(109, "<H", LEGACY_DEVICES | VGA_NOT_PRESENT)
    put(112, "<I", WBINVD | PWR_BUTTON | SLP_BUTTON | RESET_REG_SUP | HW_REDUCED_ACPI)
    put(116, "<12s", _gas(layout.PORT_ACPI + 2, 8))
    put(128, "<B", RESET_VALUE)
    put(131, "<B", 5)  # FADT minor version
    put(140, "<Q", dsdt_gpa)
    put(244, "<12s", _gas(layout.PORT_ACPI, 8))
    put(256, "<12s", _gas(layout.PORT_ACPI + 1, 8))
    put(268, "<8s", b"VMM     ")  # hypervisor vendor identity
    return table("FACP", 6, bytes(body))


def madt(config: AcpiConfig) -> bytes:
    """MADT: a local APIC (x2APIC from id 255) each, the IOAPIC, NMI on LINT1."""
    body = struct.pack("<II", layout.LAPIC, PCAT_COMPAT)
    for cpu in range(config.cpus):
        if cpu < 255:
            body += struct.pack("<BBBBI", 0, 8, cpu, cpu, LAPIC_ENABLED)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, cpu, LAPIC_ENABLED, cpu)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, layout.IOAPIC, 0)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)
    return table("APIC", 5, body)


def mcfg() -> bytes:
    """MCFG: the ECAM window, segment 0, one bus a MiB."""
    last_bus = layout.ECAM_SIZE // layout.MIB - 1
    return table("MCFG", 1, struct.pack("<8xQHBB4x", layout.ECAM_BASE, 0, 0, last_bus))


def dsdt(config: AcpiConfig) -> bytes:
    """The DSDT: legacy devices, power button, virtio-mmio devices, PCI host bridge, S5."""
    devices = [_uart(), _rtc(), _pvpanic(), _power_button(), _generation_id(), _ged()]
    devices += [
        _virtio_mmio(index, base, size, gsi)
        for index, (base, size, gsi) in enumerate(config.virtio_mmio)
    ]
    if config.pci:
        devices.append(_pci_host_bridge())
    body = aml.scope("\\_SB", *devices) + aml.name("\\_S5", aml.package(S5, 0, 0, 0))
    return table("DSDT", 2, body)


def _uart() -> bytes:
    resources = aml.resource_template(
        aml.io(layout.PORT_UART, 8), aml.irq_no_flags(layout.GSI_UART)
    )
    return aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", 0),
        aml.name("_CRS", resources),
    )


def _rtc() -> bytes:
    resources = aml.resource_template(aml.io(layout.PORT_RTC, 2), aml.irq_no_flags(layout.GSI_RTC))
    return aml.device("RTC", aml.name("_HID", aml.eisa_id("PNP0B00")), aml.name("_CRS", resources))


def _pvpanic() -> bytes:
    """As QEMU declares it (docs/specs/pvpanic.rst)."""
    return aml.device(
        "PEVT",
        aml.name("_HID", "QEMU0001"),
        aml.name("_STA", 0xF),
        aml.name("_CRS", aml.resource_template(aml.io(layout.PORT_PVPANIC, 1))),
    )


def _power_button() -> bytes:
    return aml.device(
        "PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")), aml.name("_UID", 0), aml.name("_STA", 0xF)
    )


def _generation_id() -> bytes:
    """The VM generation ID ("Virtual Machine Generation ID", Microsoft, 2012): 16 random bytes at
    layout.VMGENID that change when a snapshot is restored, which a notify tells."""
    return aml.device(
        "VGEN",
        aml.name("_HID", "VMMV0001"),
        aml.name("_CID", "VM_Gen_Counter"),
        aml.name("_DDN", "VM_Gen_Counter"),
        aml.name("ADDR", aml.package(layout.VMGENID, 0)),
    )


def _ged() -> bytes:
    """The generic event device: reading the selector tells and clears what happened."""
    selector = aml.name_seg("ESEL")
    return aml.device(
        "GED",
        aml.name("_HID", "ACPI0013"),
        aml.name("_UID", 0),
        aml.name("_CRS", aml.resource_template(aml.interrupt(layout.GSI_GED))),
        aml.operation_region("EREG", aml.SYSTEM_IO, layout.PORT_ACPI + 4, 4),
        aml.field("EREG", aml.DWORD_ACC, ("ESEL", 32)),
        aml.method(
            "_EVT",
            1,
            aml.store(selector, aml.LOCAL0),
            aml.if_(aml.bit_and(aml.LOCAL0, GED_POWER_BUTTON), aml.notify("\\_SB.PWRB", 0x80)),
            aml.if_(aml.bit_and(aml.LOCAL0, GED_GENERATION), aml.notify("\\_SB.VGEN", 0x80)),
        ),
    )


def _virtio_mmio(index: int, base: int, size: int, gsi: int) -> bytes:
    """LNRO0005: what Linux's virtio_mmio driver matches."""
    return aml.device(
        f"VR{index:02X}",
        aml.name("_HID", "LNRO0005"),
        aml.name("_UID", index),
        aml.name("_CCA", 1),
        aml.name("_CRS", aml.resource_template(aml.memory32_fixed(base, size), aml.interrupt(gsi))),
    )


def _pci_host_bridge() -> bytes:
    buses = layout.ECAM_SIZE // layout.MIB
    resources = aml.resource_template(
        aml.address_space(2, 0, buses, bits=16),
        aml.address_space(0, layout.PCI_MMIO32_BASE, layout.PCI_MMIO32_SIZE, specific=1),
    )
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", 0),
        aml.name("_SEG", 0),
        aml.name("_BBN", 0),
        aml.name("_CCA", 1),
        aml.name("_CRS", resources),
    )

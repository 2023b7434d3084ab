"""vmm/tables/acpi.py: read back field by field, and by ACPICA's disassembler and interpreter."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from tests.support import acpica
from vmm import layout
from vmm.devices import power
from vmm.tables import acpi
from vmm.tables.acpi import AcpiConfig

VIRTIO = [
    (
        layout.VIRTIO_MMIO_BASE + index * layout.VIRTIO_MMIO_STRIDE,
        layout.VIRTIO_MMIO_STRIDE,
        layout.GSI_VIRTIO[index % len(layout.GSI_VIRTIO)],
    )
    for index in range(20)
]
CONFIGS = {
    "1-cpu": AcpiConfig(1),
    "4-cpus-virtio": AcpiConfig(4, VIRTIO[:3]),
    "254-cpus-all": AcpiConfig(254, VIRTIO, pci=True),
    "pci": AcpiConfig(2, pci=True),
    "x2apic": AcpiConfig(300),
}
HEADER = struct.Struct("<4sIBB6s8sI4sI")


@pytest.fixture(params=CONFIGS, scope="module")
def config(request: pytest.FixtureRequest) -> AcpiConfig:
    return CONFIGS[request.param]


def read(tables: acpi.AcpiTables, gpa: int, size: int) -> bytes:
    """Guest memory as the blobs leave it."""
    for start, data in tables.blobs:
        if start <= gpa and gpa + size <= start + len(data):
            return data[gpa - start : gpa - start + size]
    raise AssertionError(f"no table at {gpa:#x}")


def table_at(tables: acpi.AcpiTables, gpa: int) -> bytes:
    (length,) = struct.unpack("<I", read(tables, gpa + 4, 4))
    data = read(tables, gpa, length)
    assert sum(data) & 0xFF == 0, f"checksum of {data[:4]!r}"
    return data


def test_an_os_finds_every_table_from_the_rsdp(config: AcpiConfig) -> None:
    tables = acpi.build(config)
    assert tables.rsdp % 16 == 0
    assert 0xE0000 <= tables.rsdp < 0x100000
    rsdp = read(tables, tables.rsdp, 36)
    assert rsdp[:8] == b"RSD PTR "
    assert sum(rsdp[:20]) & 0xFF == 0
    assert sum(rsdp) & 0xFF == 0
    revision, rsdt, length, xsdt = struct.unpack_from("<BIIQ", rsdp, 15)
    assert (revision, rsdt, length) == (2, 0, 36)
    root = table_at(tables, xsdt)
    assert root[:4] == b"XSDT"
    pointers = struct.unpack(f"<{(len(root) - 36) // 8}Q", root[36:])
    found = {table_at(tables, gpa)[:4] for gpa in pointers}
    assert found == {b"FACP", b"APIC"} | ({b"MCFG"} if config.pci else set())
    fadt = next(t for t in (table_at(tables, gpa) for gpa in pointers) if t[:4] == b"FACP")
    dsdt32, dsdt64 = struct.unpack_from("<I", fadt, 40)[0], struct.unpack_from("<Q", fadt, 140)[0]
    assert dsdt32 == dsdt64
    assert table_at(tables, dsdt64)[:4] == b"DSDT"


def test_tables_lie_apart_and_in_the_bios_area(config: AcpiConfig) -> None:
    end = layout.BIOS_ROM
    for gpa, data in sorted(acpi.build(config).blobs):
        assert gpa >= end
        assert gpa % 16 == 0
        end = gpa + len(data)
    assert end <= layout.MP_TABLE


def test_headers_have_our_names(config: AcpiConfig) -> None:
    for signature, data in acpi.build(config).tables.items():
        if signature == "RSDP":
            continue
        sign, length, _, _, oem, oem_table, _, creator, _ = HEADER.unpack_from(data)
        assert sign.decode() == signature
        assert length == len(data)
        assert (oem, oem_table, creator) == (b"VMM   ", b"VMMACPI ", b"VMM ")


def test_too_many_processors_are_refused() -> None:
    with pytest.raises(ValueError, match="20000 processors do not fit below"):
        acpi.build(AcpiConfig(20000))


# --- field by field -------------------------------------------------------------------------------


def gas(data: bytes, offset: int) -> tuple[int, ...]:
    return struct.unpack_from("<BBBBQ", data, offset)


def test_fadt() -> None:
    fadt = acpi.fadt(0xE1230)
    assert len(fadt) == 276
    assert fadt[8] == 6
    assert fadt[131] == 5
    (boot_arch,) = struct.unpack_from("<H", fadt, 109)
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags & 1 << 20, "HW_REDUCED_ACPI"
    assert flags & 1 << 10, "RESET_REG_SUP"
    assert flags & 1 << 4, "the power button is no fixed one"
    assert flags & 1 << 5, "nor is there a fixed sleep button"
    assert boot_arch == 1 | 4, "legacy devices, no 8042, no VGA"
    # Section 4.1: a hardware-reduced platform has none of the fixed registers, nor an SCI.
    assert fadt[46:109] == bytes(63)
    assert fadt[148:244] == bytes(96)
    port = layout.PORT_ACPI
    assert gas(fadt, 116) == (1, 8, 0, 1, port + power.RESET)
    assert fadt[128] == power.RESET_VALUE
    assert gas(fadt, 244) == (1, 8, 0, 1, port + power.SLEEP_CONTROL)
    assert gas(fadt, 256) == (1, 8, 0, 1, port + power.SLEEP_STATUS)


@pytest.mark.parametrize("cpus", [1, 4, 254, 300])
def test_madt_lists_every_processor_and_the_ioapic(cpus: int) -> None:
    madt = acpi.madt(AcpiConfig(cpus))
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 1)
    entries: dict[int, list[bytes]] = {}
    at = 44
    while at < len(madt):
        kind, length = madt[at], madt[at + 1]
        entries.setdefault(kind, []).append(madt[at : at + length])
        at += length
    assert at == len(madt)
    local = [struct.unpack("<BBBBI", entry) for entry in entries[0]]
    assert local == [(0, 8, cpu, cpu, 1) for cpu in range(min(cpus, 255))]
    x2apic = [struct.unpack("<BBHIII", entry) for entry in entries.get(9, [])]
    assert x2apic == [(9, 16, 0, cpu, 1, cpu) for cpu in range(255, cpus)]
    assert [struct.unpack("<BBBBII", entry) for entry in entries[1]] == [
        (1, 12, 0, 0, 0xFEC00000, 0)
    ]
    assert [struct.unpack("<BBBHB", entry) for entry in entries[4]] == [(4, 6, 0xFF, 0, 1)]
    assert set(entries) <= {0, 1, 4, 9}


def test_mcfg_covers_the_ecam_window() -> None:
    mcfg = acpi.mcfg()
    assert len(mcfg) == 60
    base, segment, first, last = struct.unpack_from("<QHBB", mcfg, 44)
    assert (base, segment, first) == (layout.ECAM_BASE, 0, 0)
    assert (last + 1) << 20 == layout.ECAM_SIZE


# --- as ACPICA sees them --------------------------------------------------------------------------


def test_every_table_disassembles_and_compiles_to_itself(
    config: AcpiConfig, tmp_path: Path
) -> None:
    tables = acpi.build(config).tables
    assert {"DSDT", "FACP", "APIC", "XSDT"} <= tables.keys()
    for signature, data in tables.items():
        if signature == "RSDP":
            continue  # has no table header; iasl takes it for no table
        source = acpica.disassemble(tmp_path, signature, data)
        assert f'"{signature}"' in source
        # The compiler puts its own name into the header; what follows must be the same.
        assert acpica.recompile(tmp_path, signature)[36:] == data[36:], signature


def test_the_rsdp_is_what_iasl_makes_of_its_description(tmp_path: Path) -> None:
    (tmp_path / "RSDP.dsl").write_text(
        """
        [0008] Signature : "RSD PTR "
        [0001] Checksum : 00
        [0006] Oem ID : "VMM   "
        [0001] Revision : 02
        [0004] RSDT Address : 00000000
        [0004] Length : 00000024
        [0008] XSDT Address : 00000000000E1230
        [0001] Extended Checksum : 00
        [0003] Reserved : 000000
        """
    )
    assert acpi.rsdp(0xE1230) == acpica.recompile(tmp_path, "RSDP")


def test_s5_turns_the_machine_off(tmp_path: Path) -> None:
    said = acpica.execute(tmp_path, acpi.dsdt(AcpiConfig(1)), r"evaluate \_S5")
    values = [int(text, 16) for text in re.findall(r"\[Integer\] = (\w+)", said)]
    assert values == [power.S5, 0, 0, 0]


def resources(tmp_path: Path, config: AcpiConfig, device: str) -> str:
    """What ACPICA makes of a device's _CRS; it also converts it back and compares."""
    said = acpica.execute(tmp_path, acpi.dsdt(config), rf"resources \_SB.{device}")
    assert "Evaluating _CRS" in said, said
    assert "mismatch" not in said.lower(), said
    return said


def values(said: str, field: str) -> list[int]:
    return [int(text, 16) for text in re.findall(rf"^ *{field} : (\w+)", said, re.M)]


@pytest.mark.parametrize(
    ("device", "port", "length", "irq"),
    [("COM1", 0x3F8, 8, 4), ("RTC", 0x70, 2, 8), ("PEVT", 0x505, 1, None)],
)
def test_ports_and_interrupt_of(
    device: str, port: int, length: int, irq: int | None, tmp_path: Path
) -> None:
    said = resources(tmp_path, AcpiConfig(1), device)
    assert values(said, "Address Minimum") == [port]
    assert values(said, "Address Maximum") == [port]
    assert values(said, "Address Length") == [length]
    lines = re.findall(r"Interrupt List : (\d+)", said)
    assert lines == ([] if irq is None else [str(irq)])
    assert ("Triggering : Edge" in said) == (irq is not None)


def test_virtio_mmio_devices(tmp_path: Path) -> None:
    config = AcpiConfig(2, VIRTIO)
    for index in (0, 1, len(VIRTIO) - 1):
        base, size, gsi = VIRTIO[index]
        said = resources(tmp_path, config, f"VR{index:02X}")
        assert values(said, "Address") == [base]
        assert values(said, "Address Length") == [size]
        assert values(said, "Dword00") == [gsi]
        assert "Polarity : ActiveHigh" in said
        assert "Triggering : Edge" in said


def test_pci_host_bridge(tmp_path: Path) -> None:
    said = resources(tmp_path, AcpiConfig(1, pci=True), "PCI0")
    assert values(said, "Address Minimum") == [0, layout.PCI_MMIO32_BASE]
    end = layout.PCI_MMIO32_BASE + layout.PCI_MMIO32_SIZE - 1
    assert values(said, "Address Maximum") == [layout.ECAM_SIZE // layout.MIB - 1, end]
    assert said.count(": ResourceProducer") == 2


def test_the_event_device_presses_the_power_button(tmp_path: Path) -> None:
    dsdt = acpi.dsdt(AcpiConfig(1))
    said = resources(tmp_path, AcpiConfig(1), "GED")
    assert values(said, "Dword00") == [layout.GSI_GED]
    # -fv: what reads of the selector give.
    call = rf"execute \_SB.GED._EVT {layout.GSI_GED}"
    pressed = acpica.execute(tmp_path, dsdt, call, "-fv", str(power.GED_POWER_BUTTON))
    assert re.search(r"Notify on \[PWRB\] .*Value 0x80", pressed), pressed
    other = acpica.execute(tmp_path, dsdt, call, "-fv", "0")
    assert "Notify on" not in other

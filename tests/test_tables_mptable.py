"""vmm/tables/mptable.py: read back as the MultiProcessor Specification 1.4, chapter 4, tells to."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from vmm import layout
from vmm.config import MAX_CPUS
from vmm.errors import UsageError
from vmm.tables import mptable

CPUS = [1, 4, 40, 41, MAX_CPUS]
SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}
"""Bytes of each type of entry (table 4-3)."""
PLACES = [(0x9FC00, 0xA0000), (0xF0000, 0x100000)]
"""Where an operating system looks for the floating pointer: the EBDA or the last KiB of base
memory, and the BIOS ROM (section 4)."""


@pytest.fixture(params=CPUS)
def cpus(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def find_pointer(gpa: int, data: bytes) -> int:
    """The floating pointer's GPA, found by its signature and checksum on 16-byte boundaries."""
    for start, end in PLACES:
        for at in range(start, end, 16):
            place = data[at - gpa : at - gpa + 16] if at >= gpa else b""
            if place[:4] == b"_MP_" and len(place) == 16 and sum(place) & 0xFF == 0:
                return at
    raise AssertionError("no floating pointer")


def table_of(cpus: int) -> bytes:
    gpa, data = mptable.build(cpus)
    at = find_pointer(gpa, data)
    pointer = data[at - gpa :]
    physical, length, revision, _, *features = struct.unpack_from("<IBBBBBBBB", pointer, 4)
    assert (length, revision) == (1, 4)  # in 16-byte units; 1.4
    # A configuration table is there, no default one; IMCR not present: virtual wire mode.
    assert features == [0, 0, 0, 0, 0]
    assert physical % 4 == 0
    start = physical - gpa
    (size,) = struct.unpack_from("<H", data, start + 4)
    table = data[start : start + size]
    assert sum(table) & 0xFF == 0
    assert len(table) == size
    return table


def entries_of(cpus: int) -> list[bytes]:
    table = table_of(cpus)
    found, at = [], 44
    while at < len(table):
        size = SIZES[table[at]]
        found.append(table[at : at + size])
        at += size
    assert at == len(table)
    assert struct.unpack_from("<H", table, 34) == (len(found),)
    return found


def of_type(entries: Sequence[bytes], kind: int) -> list[bytes]:
    return [entry for entry in entries if entry[0] == kind]


def test_it_lies_in_memory_reserved_for_the_firmware(cpus: int) -> None:
    gpa, data = mptable.build(cpus)
    assert layout.BIOS_ROM <= gpa
    assert gpa + len(data) <= layout.HIGH_RAM


def test_header(cpus: int) -> None:
    table = table_of(cpus)
    signature, _, revision, _, oem, product, oem_table, oem_size = struct.unpack_from(
        "<4sHBB8s12sIH", table
    )
    assert (signature, revision) == (b"PCMP", 4)
    assert (oem, product) == (b"VMM     ", b"MICROVM     ")
    assert (oem_table, oem_size) == (0, 0)
    assert struct.unpack_from("<IHB", table, 36) == (layout.LAPIC, 0, 0)


def test_entries_are_sorted_by_type(cpus: int) -> None:
    """Section 4.3 wants it so."""
    kinds = [entry[0] for entry in entries_of(cpus)]
    assert kinds == sorted(kinds)


def test_processors(cpus: int) -> None:
    found = [struct.unpack("<BBBBIIII", entry) for entry in of_type(entries_of(cpus), 0)]
    assert [entry[1] for entry in found] == list(range(cpus))
    for position, (_, _, version, flags, _, features, *reserved) in enumerate(found):
        assert 0x10 <= version <= 0x1F, "an integrated APIC"
        assert flags == (3 if position == 0 else 1), "enabled, the first one the bootstrap one"
        assert features & 1 << 9, "CPUID says APIC"
        assert reserved == [0, 0]


def test_bus_and_ioapic(cpus: int) -> None:
    entries = entries_of(cpus)
    assert of_type(entries, 1) == [b"\x01\x00ISA   "]
    ((_, apic, version, flags, address),) = (
        struct.unpack("<BBBBI", entry) for entry in of_type(entries, 2)
    )
    assert (version, flags, address) == (0x11, 1, layout.IOAPIC)
    # Ids of processors and IOAPICs are of one space, and 255 is a broadcast's.
    assert cpus <= apic < 255


def test_every_interrupt_goes_to_the_pin_of_its_number(cpus: int) -> None:
    entries = entries_of(cpus)
    apic = of_type(entries, 2)[0][1]
    found = [struct.unpack("<BBHBBBB", entry) for entry in of_type(entries, 3)]
    # (type, vectored, flags: as the bus has it, bus, IRQ, IOAPIC, pin)
    assert found == [(3, 0, 0, 0, irq, apic, irq) for irq in range(layout.IOAPIC_PINS)]
    assert {*layout.GSI_VIRTIO, *layout.GSI_VIRTIO_LOW} <= {entry[6] for entry in found}


def test_local_interrupts(cpus: int) -> None:
    found = [struct.unpack("<BBHBBBB", entry) for entry in of_type(entries_of(cpus), 4)]
    extint, nmi = 3, 1
    assert found == [(4, extint, 0, 0, 0, 0, 0), (4, nmi, 0, 0, 0, 0xFF, 1)]


def test_no_more_processors_than_ids() -> None:
    with pytest.raises(UsageError, match=r"at most 254 processors, not 255"):
        mptable.build(MAX_CPUS + 1)

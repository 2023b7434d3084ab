"""vmm/devices/nopci.py, as Linux's pci_check_type1() (arch/x86/pci/direct.c) tries it."""

from __future__ import annotations

from vmm.devices.nopci import NoPci


def test_type_1_is_there_and_no_function_is() -> None:
    ports = NoPci()
    ports.write(3, 1, 1)
    assert ports.read(0, 4) == 0
    ports.write(0, 4, 0x80000000)
    assert ports.read(0, 4) == 0x80000000
    for size in (1, 2, 4):
        assert ports.read(4, size) == (1 << 8 * size) - 1
    ports.write(4, 4, 0)
    assert ports.read(4, 4) == 0xFFFFFFFF


def test_state() -> None:
    ports, other = NoPci(), NoPci()
    ports.write(0, 4, 0xFFFFFFFF)
    other.restore(ports.save())
    assert other.read(0, 4) == 0x80FFFFFC
    other.reset()
    assert other.read(0, 4) == 0

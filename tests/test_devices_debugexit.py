"""vmm.devices.debugexit: a byte that ends the machine."""

import pytest

from vmm.devices.bus import AddressSpace
from vmm.devices.debugexit import DebugExit


@pytest.mark.parametrize(
    ("size", "value", "status"), [(1, 0, 0), (1, 255, 255), (2, 0x1234, 0x34), (4, 0xFFFFFF07, 7)]
)
def test_the_low_byte_is_the_status(size: int, value: int, status: int) -> None:
    got: list[int] = []
    space = AddressSpace("pio", 16)
    space.add(0xF4, DebugExit.LENGTH, DebugExit(got.append))
    space.write(0xF4, size, value)
    assert got == [status]


def test_the_other_ports_do_nothing() -> None:
    got: list[int] = []
    device = DebugExit(got.append)
    for offset in (1, 2, 3):
        device.write(offset, 1, 5)
    assert got == []
    assert device.read(0, 1) == 0xFF

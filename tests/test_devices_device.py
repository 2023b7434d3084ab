"""vmm.devices.device: byte cycles and checked state."""

import pytest

from vmm.devices.device import ByteDevice, Device, state_bytes, state_int
from vmm.errors import ShapeError


class Four(ByteDevice):
    LENGTH = 4

    def __init__(self) -> None:
        super().__init__("four")
        self.cells = bytearray(b"\x11\x22\x33\x44")

    def read8(self, offset: int) -> int:
        return self.cells[offset]

    def write8(self, offset: int, value: int) -> None:
        self.cells[offset] = value


def test_a_bare_device_reads_all_ones() -> None:
    device = Device("bare")
    assert [device.read(0, size) for size in (1, 2, 4, 8)] == [
        0xFF,
        0xFFFF,
        0xFFFFFFFF,
        0xFFFFFFFFFFFFFFFF,
    ]


def test_wide_accesses_are_byte_cycles_low_byte_first() -> None:
    device = Four()
    assert device.read(0, 4) == 0x44332211
    device.write(1, 2, 0xBBAA)
    assert device.cells == b"\x11\xaa\xbb\x44"


def test_bytes_past_the_end_read_ones_and_are_dropped() -> None:
    device = Four()
    assert device.read(3, 4) == 0xFFFFFF44
    device.write(3, 4, 0x01020304)
    assert device.cells == b"\x11\x22\x33\x04"


def test_state_of_a_wrong_type_is_refused() -> None:
    assert state_int({"a": 0x1FF}, "a", 0xFF) == 0xFF
    with pytest.raises(ShapeError, match="a is 'x', not an integer"):
        state_int({"a": "x"}, "a", 0xFF)
    with pytest.raises(ShapeError, match="b is 3, not bytes"):
        state_bytes({"b": 3}, "b")

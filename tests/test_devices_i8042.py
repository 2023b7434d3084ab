"""vmm.devices.i8042: a reset line and no keyboard."""

from __future__ import annotations

import pytest

from vmm.devices.bus import AddressSpace
from vmm.devices.i8042 import I8042


@pytest.fixture
def ports() -> tuple[AddressSpace, list[str]]:
    resets: list[str] = []
    space = AddressSpace("pio", 16)
    device = I8042(lambda: resets.append("reset"))
    space.add(0x60, 1, device)
    space.add(0x64, 1, device, offset=4)
    return space, resets


def test_command_fe_resets(ports: tuple[AddressSpace, list[str]]) -> None:
    space, resets = ports
    space.write(0x64, 1, 0xFE)
    assert resets == ["reset"]
    for command in (0x20, 0x60, 0xAA, 0xAD, 0xD1, 0xED, 0xF1, 0xFF):
        space.write(0x64, 1, command)
    space.write(0x60, 1, 0xFE)
    assert resets == ["reset"]


def test_linux_kb_wait_goes_on_at_once(ports: tuple[AddressSpace, list[str]]) -> None:
    """arch/x86/kernel/reboot.c polls for the input buffer (bit 1) to be empty."""
    assert ports[0].read(0x64, 1) & 0x02 == 0


def test_linux_finds_no_controller(ports: tuple[AddressSpace, list[str]]) -> None:
    """drivers/input/serio/i8042.c, i8042_flush: still full after 16 reads means none there."""
    space, _ = ports
    reads = 0
    while space.read(0x64, 1) & 0x01:
        reads += 1
        if reads > 16:
            break
        space.read(0x60, 1)
    assert reads == 17


def test_the_pits_port_between_is_left_alone(ports: tuple[AddressSpace, list[str]]) -> None:
    assert ports[0].lookup(0x61) is None

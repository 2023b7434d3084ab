"""A hostile guest: seeded random accesses to every device, and nothing but values comes back."""

from __future__ import annotations

import itertools
import random

import pytest

from vmm import layout
from vmm.devices.bus import AddressSpace
from vmm.devices.debugexit import DebugExit
from vmm.devices.device import Device
from vmm.devices.i8042 import I8042
from vmm.devices.power import AcpiPower
from vmm.devices.pvpanic import PvPanic
from vmm.devices.rtc import Rtc
from vmm.devices.uart import Uart

ACCESSES = 100_000


class Machine:
    """All devices on one port space, as the monitor puts them."""

    def __init__(self) -> None:
        self.levels = {"uart": [0], "power": [0]}
        self.events = 0
        self.sent = 0
        self.uart = Uart(self.levels["uart"].append, self.count)
        power = AcpiPower(self.event, self.event, self.levels["power"].append)
        i8042 = I8042(self.event)
        windows: list[tuple[int, int, Device, int]] = [
            (layout.PORT_UART, Uart.LENGTH, self.uart, 0),
            (layout.PORT_RTC, Rtc.LENGTH, Rtc(1 << 30), 0),
            (layout.PORT_I8042, 1, i8042, 0),
            (layout.PORT_I8042 + 4, 1, i8042, 4),
            (layout.PORT_PVPANIC, 1, PvPanic(self.event), 0),
            (layout.PORT_ACPI, AcpiPower.LENGTH, power, 0),
            (layout.PORT_EXIT, DebugExit.LENGTH, DebugExit(self.event), 0),
        ]
        self.space = AddressSpace("pio", 16)
        for base, length, device, offset in windows:
            self.space.add(base, length, device, offset)
        self.starts = [base for base, _, _, _ in windows]
        self.power = power

    def event(self, *args: object) -> None:
        self.events += 1

    def count(self, data: bytes) -> None:
        self.sent += len(data)


@pytest.mark.parametrize("seed", range(3))
def test_random_accesses_never_raise(seed: int) -> None:
    chance = random.Random(seed)
    machine = Machine()
    for _ in range(ACCESSES):
        size = chance.choice((1, 1, 1, 1, 2, 4, 8, 3, 5, 6, 7))
        if chance.random() < 0.95:
            addr = max(chance.choice(machine.starts) + chance.randrange(-4, 12), 0)
        else:
            addr = chance.randrange(1 << 16)
        what = chance.random()
        if what < 0.5:
            value = machine.space.read(addr, size)
            assert type(value) is int
            assert 0 <= value < 1 << (8 * size), (hex(addr), size, value)
        elif what < 0.95:
            value = chance.choice((0, 1, (1 << (8 * size)) - 1, chance.getrandbits(8 * size)))
            machine.space.write(addr, size, value)
        elif what < 0.97:
            machine.uart.receive(chance.randbytes(chance.randrange(40)))
        elif what < 0.98:
            machine.uart.send_break()
        elif what < 0.985:
            machine.uart.write_many(chance.randbytes(chance.randrange(40)))
        elif what < 0.99:
            machine.power.press_power_button()
        else:
            for device in machine.space.devices():
                state = device.save()
                device.restore(state)
                assert device.save().keys() == state.keys()
    assert machine.events and machine.sent, "it did reach the devices"
    for name, levels in machine.levels.items():
        assert all(a != b for a, b in itertools.pairwise(levels)), name
        assert set(levels) <= {0, 1}

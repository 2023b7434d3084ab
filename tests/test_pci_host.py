"""vmm/pci/host.py: ways into configuration space, and BARs that move, overlap and go astray."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from vmm import layout
from vmm.devices.bus import AddressSpace
from vmm.devices.device import Device
from vmm.errors import UsageError
from vmm.pci import spec
from vmm.pci.function import Bar, PciFunction
from vmm.pci.host import PORTS, SLOTS, PciHost

RAM_END = layout.HOLE_END + layout.GIB
SIZES = (4096, 16384, 1 << 20)


class Registers(Device):
    """Answers with its number and the offset."""

    def __init__(self, number: int) -> None:
        super().__init__(f"bar {number}")
        self.number = number

    def read(self, offset: int, size: int) -> int:
        return (self.number << 24 | offset) & (1 << 8 * size) - 1


class Rig:
    """A bus with three functions of two BARs each: `bars` are (slot, register, BAR)."""

    def __init__(self) -> None:
        self.space = AddressSpace("mmio", 64)
        self.ports = AddressSpace("port", 16)
        self.host = PciHost(self.space, RAM_END)
        self.space.add(layout.ECAM_BASE, layout.ECAM_SIZE, self.host)
        self.ports.add(layout.PORT_PCI, PORTS, self.host.ports)
        self.bars: list[tuple[int, int, Bar]] = []
        self.moves: list[tuple[int, int | None]] = []
        for slot, size in enumerate(SIZES, 1):
            function = PciFunction(f"f{slot}", 0x1AF4, 0x1040 + slot, spec.CLASS_OTHER)
            for index in (0, 4):
                number = len(self.bars)
                bar = function.add_bar(index, size, Registers(number), wide=index == 4)
                bar.moved = lambda base, number=number: self.moves.append((number, base))  # type: ignore[misc]
                self.bars.append((slot, spec.BAR0 + 4 * index, bar))
            assert self.host.add(function) == slot

    def config(self, slot: int, register: int, size: int = 4) -> int:
        return self.space.read(layout.ECAM_BASE + (slot << 15) + register, size)

    def set_config(self, slot: int, register: int, size: int, value: int) -> None:
        self.space.write(layout.ECAM_BASE + (slot << 15) + register, size, value)

    def enable(self, slot: int, memory: bool = True) -> None:
        self.set_config(slot, spec.COMMAND, 2, spec.COMMAND_MEMORY if memory else 0)

    def place(self, number: int, base: int) -> None:
        """As Linux does it, but for the decoding, which stays on."""
        slot, register, bar = self.bars[number]
        self.set_config(slot, register, 4, base & 0xFFFFFFFF)
        if bar.wide:
            self.set_config(slot, register + 4, 4, base >> 32)

    def answers(self, number: int, base: int) -> bool:
        """Whether BAR `number` answers all of its window at `base`."""
        size = self.bars[number][2].size
        return all(
            self.space.read(base + offset, 4) == number << 24 | offset & 0xFFFFFF
            for offset in (0, 4, size - 4)
        )

    def windows(self) -> dict[int, tuple[int, int]]:
        return {
            device.number: (base, length)
            for base, length, device in self.space.windows()
            if isinstance(device, Registers)
        }


@pytest.fixture
def rig() -> Iterator[Rig]:
    yield Rig()


# --- configuration space --------------------------------------------------------------------------


def test_who_is_there(rig: Rig) -> None:
    ids = {slot: rig.config(slot, spec.VENDOR_ID) for slot in range(32)}
    assert ids.pop(0) == 0x00081B36
    assert [ids.pop(slot) for slot in (1, 2, 3)] == [0x10411AF4, 0x10421AF4, 0x10431AF4]
    assert set(ids.values()) == {0xFFFFFFFF}
    assert rig.config(0, spec.CLASS_CODE, 2) == 0x0000
    assert rig.config(0, spec.CLASS_CODE + 2, 1) == 0x06


def test_functions_and_buses_that_are_not_there(rig: Rig) -> None:
    for function in range(1, 8):
        place = layout.ECAM_BASE + (1 << 15) + (function << 12)
        rig.space.write(place + spec.COMMAND, 2, 0xFFFF)
        assert rig.space.read(place, 4) == 0xFFFFFFFF
    rig.ports.write(0xCF8, 4, 1 << 31 | 1 << 16)  # bus 1, device 0
    assert rig.ports.read(0xCFC, 4) == 0xFFFFFFFF


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (1, 2), (2, 2), (3, 4), (0, 8), (5, 8)])
def test_accesses_of_any_size_and_place(rig: Rig, offset: int, size: int) -> None:
    whole = b"".join(rig.config(2, at, 1).to_bytes(1, "little") for at in range(16))
    want = int.from_bytes(whole[offset : offset + size], "little")
    assert rig.config(2, offset, size) == want


def test_an_access_over_the_end_of_a_function(rig: Rig) -> None:
    assert rig.config(0, 0xFFC, 8) == 0xFFFFFFFF_00000000  # function 1 of the bridge is not there
    rig.set_config(0, 0xFFC, 8, (1 << 64) - 1)
    assert rig.config(0, 0xFFC, 4) == 0


def test_ports(rig: Rig) -> None:
    """As Linux looks for them (pci_check_type1), and uses them."""
    ports = rig.ports
    ports.write(0xCFB, 1, 1)
    assert ports.read(0xCF8, 4) == 0
    ports.write(0xCF8, 4, 1 << 31)
    assert ports.read(0xCF8, 4) == 1 << 31
    assert ports.read(0xCFC, 4) == 0x00081B36
    for slot in range(SLOTS):
        for register in range(0, 0x40, 4):
            ports.write(0xCF8, 4, 1 << 31 | slot << 11 | register)
            assert ports.read(0xCFC, 4) == rig.config(slot, register)
            assert ports.read(0xCFE, 2) == rig.config(slot, register + 2, 2)
            assert ports.read(0xCFD, 1) == rig.config(slot, register + 1, 1)
    ports.write(0xCF8, 4, 1 << 31 | 1 << 11 | spec.COMMAND)
    ports.write(0xCFC, 2, spec.COMMAND_MEMORY)
    assert rig.config(1, spec.COMMAND, 2) == spec.COMMAND_MEMORY
    ports.write(0xCF8, 4, 1 << 11)  # not enabled: ports like any other
    assert ports.read(0xCFC, 4) == 0xFFFFFFFF
    ports.write(0xCFC, 4, 0)
    assert rig.config(1, spec.COMMAND, 2) == spec.COMMAND_MEMORY


def test_ports_beyond_the_data_register(rig: Rig) -> None:
    rig.ports.write(0xCF8, 4, 1 << 31)
    assert rig.ports.read(0xCFE, 4) & 0xFFFF == 0x0008
    assert rig.ports.read(0xCFF, 8) >> 8 == (1 << 56) - 1


# --- BARs ---------------------------------------------------------------------------------------


def test_where_firmware_would_put_them(rig: Rig) -> None:
    taken: list[range] = []
    for slot, register, bar in rig.bars:
        base = rig.config(slot, register) & ~0xF
        assert base % bar.size == 0
        here = range(base, base + bar.size)
        assert layout.PCI_MMIO32_BASE <= here.start
        assert here.stop <= layout.PCI_MMIO32_BASE + layout.PCI_MMIO32_SIZE
        assert not any(here.start < other.stop and other.start < here.stop for other in taken)
        taken.append(here)
    assert rig.windows() == {}  # not before memory decoding is enabled
    for slot in (1, 2, 3):
        rig.enable(slot)
    assert all(rig.answers(number, here.start) for number, here in enumerate(taken))
    rig.enable(2, memory=False)
    assert rig.windows().keys() == {0, 1, 4, 5}


@pytest.mark.parametrize("number", range(6))
def test_a_guest_moves_a_bar(rig: Rig, number: int) -> None:
    for slot in (1, 2, 3):
        rig.enable(slot)
    rig.moves.clear()
    places = [0xC8000000, 0xCFF00000, layout.PCI_MMIO32_BASE + (1 << 24), 0xF0000000]
    if rig.bars[number][2].wide:
        places += [RAM_END, 1 << 40, (1 << 52) - (1 << 20)]
    for base in places:
        rig.place(number, base)
        assert rig.answers(number, base)
        assert rig.moves[-1] == (number, base)
        assert len(rig.windows()) == 6


@pytest.mark.parametrize(
    "base",
    [
        0, 0x100000, layout.HOLE_START - (1 << 20), layout.ECAM_BASE, layout.IOAPIC & ~0xFFFFF,
        layout.LAPIC & ~0xFFFFF, 0xFFF00000, layout.HOLE_END, RAM_END - (1 << 20), 1 << 52,
        (1 << 64) - (1 << 20),
    ],
)  # fmt: skip
def test_where_nobody_may_be(rig: Rig, base: int) -> None:
    """RAM, interrupt controllers, configuration space: the BAR answers nowhere, and comes back."""
    rig.enable(3)
    before = rig.windows()
    rig.place(5, base)
    assert rig.windows().keys() == before.keys() - {5}
    assert rig.config(1, spec.VENDOR_ID) == 0x10411AF4
    rig.place(5, 0xC8000000)
    assert rig.answers(5, 0xC8000000)


def test_overlapping_bars(rig: Rig) -> None:
    for slot in (1, 2, 3):
        rig.enable(slot)
    there = rig.windows()[4][0]
    rig.place(0, there + 0x1000)
    assert rig.answers(4, there)  # the first stays
    assert 0 not in rig.windows()
    rig.place(4, 0xC8000000)
    assert rig.answers(4, 0xC8000000)
    assert rig.answers(0, there + 0x1000)  # and the other one gets its place
    rig.place(4, there)
    assert 4 not in rig.windows()
    rig.enable(1, memory=False)
    assert rig.answers(4, there)


def test_anything_anywhere(rig: Rig) -> None:
    chance = random.Random(2)
    places = [0, 1 << 20, 0xC0000000, 0xC0001000, 0xC0100000, 0xE0000000, 0xFEC00000, RAM_END,
              0xFFFFFFFF, (1 << 64) - 1, 1 << 51]  # fmt: skip
    for _ in range(5000):
        number = chance.randrange(6)
        slot = rig.bars[number][0]
        if chance.random() < 0.2:
            rig.set_config(slot, chance.randrange(0x40), chance.choice((1, 2, 4, 8)),
                           chance.getrandbits(64))  # fmt: skip
        elif chance.random() < 0.2:
            rig.enable(slot, chance.random() < 0.8)
        else:
            rig.place(number, chance.choice(places) + chance.randrange(4) * 0x1000)
        for place, (base, length) in rig.windows().items():
            assert rig.bars[place][2].base == base
            assert layout.HOLE_START <= base
            assert base + length <= layout.IOAPIC or base >= RAM_END
    for slot in (1, 2, 3):
        rig.enable(slot)
    for number in range(6):
        rig.place(number, 0xC1000000 + number * (1 << 20))
    assert all(rig.answers(number, 0xC1000000 + number * (1 << 20)) for number in range(6))


def test_no_room() -> None:
    host = PciHost(AddressSpace("mmio", 64), 0)
    for _ in range(SLOTS - 1):
        host.add(PciFunction("f", 1, 2, 3))
    with pytest.raises(UsageError, match="more than 31 devices on the PCI bus"):
        host.add(PciFunction("f", 1, 2, 3))
    large = PciFunction("large", 1, 2, 3)
    large.add_bar(0, 1 << 29, Device("bar"))
    with pytest.raises(UsageError, match="large: no room for 536870912 bytes of PCI memory"):
        PciHost(AddressSpace("mmio", 64), 0).add(large)


def test_devices_are_closed_with_the_bus() -> None:
    closed: list[str] = []

    class Closing(Device):
        def close(self) -> None:
            closed.append(self.name)

    host = PciHost(AddressSpace("mmio", 64), 0)
    host.add(PciFunction("f", 1, 2, 3), Closing("a"), Closing("b"))
    host.close()
    host.close()
    assert closed == ["a", "b"]


def test_save_and_restore(rig: Rig) -> None:
    for slot in (1, 2, 3):
        rig.enable(slot)
    rig.place(5, 1 << 40)
    rig.ports.write(0xCF8, 4, 1 << 31 | 2 << 11)
    state, windows = rig.host.save(), rig.windows()
    again = Rig()
    again.host.restore(state)
    assert again.windows() == windows
    assert again.ports.read(0xCFC, 4) == 0x10421AF4
    with pytest.raises(ValueError, match="not 4 functions"):
        again.host.restore({"functions": [], "address": 0})

"""vmm.devices.bus: who answers at an address."""

import threading

import pytest

from vmm.devices import bus
from vmm.devices.bus import AddressSpace, BusError
from vmm.devices.device import ByteDevice


class Ram(ByteDevice):
    """Registers that keep what is written."""

    def __init__(self, name: str, length: int) -> None:
        super().__init__(name)
        self.LENGTH = length
        self.cells = bytearray(length)

    def read8(self, offset: int) -> int:
        return self.cells[offset]

    def write8(self, offset: int, value: int) -> None:
        self.cells[offset] = value


def test_a_device_sees_its_offset() -> None:
    space, ram = AddressSpace("pio", 16), Ram("ram", 8)
    space.add(0x3F8, 8, ram)
    space.write(0x3F8 + 5, 1, 0x77)
    assert ram.cells[5] == 0x77
    assert space.read(0x3FC, 2) == 0x7700
    assert space.lookup(0x3FA) == (ram, 2)
    assert space.lookup(0x400) is None


def test_a_second_window_of_a_device_starts_at_the_offset_given() -> None:
    space, ram = AddressSpace("pio", 16), Ram("ram", 5)
    space.add(0x60, 1, ram)
    space.add(0x64, 1, ram, offset=4)
    space.write(0x64, 1, 9)
    space.write(0x61, 1, 7)
    assert ram.cells == b"\0\0\0\0\x09"
    assert space.devices() == [ram]
    assert space.windows() == [(0x60, 1, ram), (0x64, 1, ram)]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_unclaimed_addresses_read_all_ones(size: int) -> None:
    space = AddressSpace("mmio", 64)
    assert space.read(0xD0000000, size) == (1 << (8 * size)) - 1
    space.write(0xD0000000, size, 0)


def test_an_access_over_an_edge_is_split() -> None:
    space, low, high = AddressSpace("pio", 16), Ram("low", 2), Ram("high", 2)
    space.add(0x10, 2, low)
    space.add(0x13, 2, high)
    space.write(0x10, 8, 0x8877665544332211)
    assert (low.cells, high.cells) == (b"\x11\x22", b"\x44\x55")
    assert space.read(0x11, 4) == 0x5544FF22
    assert space.read(0x0E, 4) == 0x2211FFFF, "from unclaimed into claimed"


def test_the_last_address_does_not_wrap() -> None:
    space, first = AddressSpace("pio", 16), Ram("first", 4)
    space.add(0, 4, first)
    space.write(0xFFFE, 4, 0x44332211)
    assert first.cells == bytes(4)
    assert space.read(0xFFFF, 4) == 0xFFFFFFFF


@pytest.mark.parametrize(
    ("base", "length"), [(0x3F8, 8), (0x3F0, 9), (0x3FF, 1), (0x3FA, 2), (0x300, 0x200)]
)
def test_an_overlap_names_both_devices(base: int, length: int) -> None:
    space = AddressSpace("pio", 16)
    space.add(0x3F8, 8, Ram("uart", 8))
    space.add(0x10, 1, Ram("other", 1))
    with pytest.raises(BusError, match=r"pio: late at .* overlaps uart at 0x3f8\.\.0x3ff"):
        space.add(base, length, Ram("late", length))


@pytest.mark.parametrize(("base", "length"), [(-1, 2), (0xFFFF, 2), (0x10000, 1), (5, 0)])
def test_windows_outside_the_space_are_refused(base: int, length: int) -> None:
    with pytest.raises(BusError, match=r"outside 0\.\.0xffff"):
        AddressSpace("pio", 16).add(base, length, Ram("ram", 4))


def test_neighbours_are_no_overlap() -> None:
    space = AddressSpace("pio", 16)
    for base in (8, 0, 4, 12):
        space.add(base, 4, Ram(f"ram{base}", 4))
    assert [base for base, _, _ in space.windows()] == [0, 4, 8, 12]


def test_a_removed_device_is_gone_also_from_the_cache() -> None:
    space, ram, stays = AddressSpace("mmio", 64), Ram("ram", 4), Ram("stays", 4)
    space.add(0x1000, 4, ram)
    space.add(0x2000, 4, stays)
    assert space.read(0x1000, 4) == 0
    space.remove(ram)
    assert space.read(0x1000, 4) == 0xFFFFFFFF
    assert space.read(0x2000, 4) == 0
    space.add(0x1000, 4, Ram("new", 4))
    assert space.read(0x1000, 4) == 0


def test_the_cache_stays_bounded_while_a_guest_walks_the_space() -> None:
    space = AddressSpace("mmio", 64)
    length = 3 * bus.CACHE_LIMIT
    space.add(0xC0000000, length, Ram("big", length))
    for offset in range(length):
        assert space.read(0xC0000000 + offset, 1) == 0
    assert len(space._cache) <= bus.CACHE_LIMIT


def test_trace_tells_each_address_once_and_falls_silent() -> None:
    space = AddressSpace("pio", 16)
    lines: list[str] = []
    space.trace = lines.append
    for _ in range(3):
        space.read(0x80, 1)
        space.write(0x80, 2, 0xABCD)
    assert lines == [
        "pio: read of 1 at 0x80: nobody there",
        "pio: write of 2 at 0x80, value 0xabcd: nobody there",
    ]
    for port in range(0x1000, 0x2000):
        space.read(port, 1)
    assert len(lines) == bus.TRACE_LIMIT + 1
    assert "not told" in lines[-1]


def test_threads_may_read_while_devices_come_and_go() -> None:
    space, fixed, plugged = AddressSpace("mmio", 64), Ram("fixed", 16), Ram("plugged", 16)
    space.add(0x1000, 16, fixed)
    wrong: list[int] = []
    done = threading.Event()

    def guest() -> None:
        while not done.is_set():
            if space.read(0x1004, 4) != 0:
                wrong.append(1)
            if space.read(0x2004, 4) not in (0, 0xFFFFFFFF):
                wrong.append(2)

    threads = [threading.Thread(target=guest) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(2000):
        space.add(0x2000, 16, plugged)
        space.remove(plugged)
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert space.read(0x2004, 4) == 0xFFFFFFFF, "no stale entry"

"""vmm/virtio/mmio.py: every register of the table in 4.2.2, its size, and what a reset leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.virtio_driver import BUFFERS, Driver
from vmm.errors import ShapeError
from vmm.virtio import mmio, spec
from vmm.virtio.device import VirtioDevice
from vmm.virtio.mmio import MmioTransport
from vmm.virtio.queue import Chain


class Card(VirtioDevice):
    ID = 62
    FEATURES = 1 << 3 | 1 << 50
    QUEUES = (128, 32)

    def __init__(self) -> None:
        super().__init__("card")
        self.config[:] = bytes(range(0x10, 0x30))

    def request(self, index: int, chain: Chain) -> int | None:
        return chain.write(b"x")

    def config_written(self, offset: int, data: bytes) -> None:
        self.config[offset : offset + len(data)] = data


@pytest.fixture
def driver() -> Iterator[Driver]:
    with Driver(Card()) as each:
        yield each


WRITE_ONLY = (
    mmio.DEVICE_FEATURES_SEL, mmio.DRIVER_FEATURES, mmio.DRIVER_FEATURES_SEL, mmio.QUEUE_SEL,
    mmio.QUEUE_NUM, mmio.QUEUE_NOTIFY, mmio.INTERRUPT_ACK, mmio.QUEUE_DESC, mmio.QUEUE_DESC + 4,
    mmio.QUEUE_DRIVER, mmio.QUEUE_DRIVER + 4, mmio.QUEUE_DEVICE, mmio.QUEUE_DEVICE + 4,
)  # fmt: skip


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0x000, 0x74726976), (0x004, 2), (0x008, 62), (0x00C, 0x4D4D56),
        (0x034, 128), (0x044, 1), (0x060, 0), (0x070, 15), (0x0C0, 0), (0x0FC, 0),
        (0x0B0, 0xFFFFFFFF), (0x0B4, 0xFFFFFFFF), (0x0B8, 0xFFFFFFFF), (0x0BC, 0xFFFFFFFF),
        (0x100, 0x13121110), (0x118, 0x2B2A2928),
        *((offset, 0) for offset in WRITE_ONLY),
        (0x03C, 0), (0x0A8, 0), (0x0F8, 0), (0x120, 0), (0x1FC, 0),  # nothing is there
    ],
)  # fmt: skip
def test_what_a_register_reads(driver: Driver, offset: int, value: int) -> None:
    driver.write(mmio.QUEUE_SEL, 0)
    assert driver.read(offset) == value


@pytest.mark.parametrize("offset", range(0, 0x100, 4))
def test_registers_are_32_bits_wide(driver: Driver, offset: int) -> None:
    """4.2.2.2: other accesses read 0, and write nothing."""
    state = driver.transport.save()
    for size, at in ((1, 0), (2, 0), (8, 0), (4, 1), (4, 2), (4, 3), (1, 3)):
        assert driver.read(offset + at, size) == 0
        driver.write(offset + at, (1 << 8 * size) - 1, size)
        driver.write(offset + at, 0, size)
    assert driver.transport.save() == state


@pytest.mark.parametrize(("size", "value"), [(1, 0x14), (2, 0x1514), (4, 0x17161514),
                                             (8, 0x1B1A191817161514)])  # fmt: skip
def test_the_configuration_space_has_any_width(driver: Driver, size: int, value: int) -> None:
    assert driver.read(mmio.CONFIG + 4, size) == value
    driver.write(mmio.CONFIG + 4, ~value & (1 << 8 * size) - 1, size)
    assert driver.read(mmio.CONFIG + 4, size) == ~value & (1 << 8 * size) - 1
    assert driver.read(mmio.CONFIG + 4 + size, 1) == 0x14 + size


def test_features_come_in_halves(driver: Driver) -> None:
    halves = []
    for half in (0, 1, 2, 3, 0xFFFFFFFF):
        driver.write(mmio.DEVICE_FEATURES_SEL, half)
        halves.append(driver.read(mmio.DEVICE_FEATURES))
    offered = driver.device.features
    assert halves == [offered & 0xFFFFFFFF, offered >> 32, 0, 0, 0]
    assert offered & (1 << 3 | 1 << 50 | 1 << spec.F_VERSION_1)


def test_the_drivers_features_come_in_halves(driver: Driver) -> None:
    driver.write(mmio.STATUS, 0)
    driver.write(mmio.STATUS, spec.ACKNOWLEDGE | spec.DRIVER)
    for half, value in ((1, 0xFFFF), (0, 8), (1, 1), (2, 0xFFFFFFFF), (0xFFFFFFFF, 1)):
        driver.write(mmio.DRIVER_FEATURES_SEL, half)
        driver.write(mmio.DRIVER_FEATURES, value)
    assert driver.device.driver_features == 1 << 32 | 8


@pytest.mark.parametrize("index", [2, 3, 0xFFFF, 0xFFFFFFFF])
def test_a_queue_that_is_not_there(driver: Driver, index: int) -> None:
    state = driver.transport.save()
    driver.write(mmio.QUEUE_SEL, index)
    assert driver.read(mmio.QUEUE_NUM_MAX) == 0
    assert driver.read(mmio.QUEUE_READY) == 0
    for register in (mmio.QUEUE_NUM, mmio.QUEUE_READY, mmio.QUEUE_DESC, mmio.QUEUE_RESET):
        driver.write(register, 1)
        driver.write(register, 0)
    driver.write(mmio.QUEUE_NOTIFY, index)
    assert driver.transport.save() == state | {"queue_sel": index}


def test_each_queue_has_its_own_registers(driver: Driver) -> None:
    driver.negotiate()
    for index, size in ((0, 16), (1, 32)):
        driver.write(mmio.QUEUE_SEL, index)
        driver.write(mmio.QUEUE_NUM, size)
        for place, register in enumerate((mmio.QUEUE_DESC, mmio.QUEUE_DRIVER, mmio.QUEUE_DEVICE)):
            driver.write(register + 4, index + 1)
            driver.write(register, 0x1000 * place)
    for index, slot in enumerate(driver.device.slots):
        above = index + 1 << 32
        assert (slot.size, slot.desc, slot.driver, slot.device) == (
            16 << index, above, above | 0x1000, above | 0x2000,
        )  # fmt: skip


def test_a_ready_queue_keeps_its_addresses(driver: Driver) -> None:
    slot = driver.device.slots[1]
    before = (slot.size, slot.desc, slot.driver, slot.device)
    driver.write(mmio.QUEUE_SEL, 1)
    for register in (mmio.QUEUE_NUM, mmio.QUEUE_DESC, mmio.QUEUE_DRIVER, mmio.QUEUE_DEVICE + 4):
        driver.write(register, 2)
    assert (slot.size, slot.desc, slot.driver, slot.device) == before
    driver.write(mmio.QUEUE_READY, 0)
    assert driver.read(mmio.QUEUE_READY) == 0
    driver.write(mmio.QUEUE_NUM, 2)
    assert slot.size == 2


def test_interrupts_are_acknowledged_one_by_one(driver: Driver) -> None:
    driver.device.config_changed()
    driver.rings[0].add([(BUFFERS, 4, True)])
    driver.kick()
    assert driver.read(mmio.INTERRUPT_STATUS) == 3
    assert isinstance(driver.transport, MmioTransport)
    assert os.eventfd_read(driver.transport.irq_fd) == 2
    driver.write(mmio.INTERRUPT_ACK, 4 | 1)
    assert driver.read(mmio.INTERRUPT_STATUS) == 2
    driver.write(mmio.INTERRUPT_ACK, 2)
    assert driver.read(mmio.INTERRUPT_STATUS) == 0


def test_the_generation_tells_of_changes(driver: Driver) -> None:
    for want in (1, 2, 3):
        driver.device.config_changed()
        assert driver.read(mmio.CONFIG_GENERATION) == want


def test_a_reset_leaves_nothing(driver: Driver) -> None:
    driver.device.config_changed()
    driver.write(mmio.QUEUE_SEL, 1)
    driver.write(mmio.DEVICE_FEATURES_SEL, 1)
    driver.write(mmio.STATUS, 0x100)  # the register is 8 bits: that is 0
    state = driver.transport.save()
    device = state.pop("device")
    assert isinstance(device, dict)
    assert set(state.values()) == {0}
    assert (device["status"], device["features"]) == (0, 0)
    assert [queue["size"] for queue in device["queues"]] == [128, 32]
    assert all("ring" not in queue and not queue["desc"] for queue in device["queues"])


def test_notifies_wake_who_serves(driver: Driver) -> None:
    driver.transport.served = True
    driver.rings[1].add([(BUFFERS, 4, True)])
    driver.kick(1)
    driver.kick(2)
    assert driver.rings[1].used() == []
    assert os.eventfd_read(driver.transport.notify_fds[1]) == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(driver.transport.notify_fds[0])


def test_it_is_connected_at_the_first_driver_ok() -> None:
    connected: list[int] = []
    with Driver(Card()) as driver:
        driver.write(mmio.STATUS, 0)
        driver.transport.on_driver_ok = lambda: connected.append(driver.device.status)
        driver.start()
        driver.start()
        assert connected == [11]  # before it takes effect


def test_a_closed_transport_has_no_descriptors() -> None:
    before = os.listdir("/proc/self/fd")
    transport = MmioTransport(Card())
    assert len(os.listdir("/proc/self/fd")) == len(before) + 3
    transport.close()
    transport.close()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("change", [{"device": 1}, {"interrupt": None}, {"queue_sel": "1"}])
def test_a_state_that_is_none(driver: Driver, change: dict[str, object]) -> None:
    with pytest.raises(ShapeError, match="state of "):
        driver.transport.restore(driver.transport.save() | change)

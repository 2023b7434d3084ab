"""vmm/virtio/{queue,split,packed}.py: what goes in comes out, in every mode, over many wraps."""

from __future__ import annotations

import random

import pytest

from tests.support.virtio_driver import BUFFERS, Driver
from tests.support.virtio_pci import PciDriver
from vmm.virtio import spec
from vmm.virtio.device import VirtioDevice
from vmm.virtio.queue import (
    BATCH_BUFFERS,
    CHAIN_MAX,
    Chain,
    QueueError,
    VirtQueue,
    need_event,
)
from vmm.virtio.split import SplitQueue


class Echo(VirtioDevice):
    """Writes back what it read, upper case; keeps chains while `held` is a list."""

    ID = 63
    QUEUES = (64, 64)

    def __init__(self) -> None:
        super().__init__("echo")
        self.held: list[tuple[int, VirtQueue, Chain]] | None = None

    def request(self, index: int, chain: Chain) -> int | None:
        if self.held is not None:
            queue = self.slots[index].queue
            assert queue is not None
            self.held.append((index, queue, chain))
            return None
        return chain.write(chain.read().upper())


MODES = [(packed, event_idx) for packed in (False, True) for event_idx in (False, True)]


@pytest.fixture(params=[Driver, PciDriver], ids=["mmio", "pci"])
def transport(request: pytest.FixtureRequest) -> type[Driver]:
    kind: type[Driver] = request.param
    return kind


@pytest.fixture(params=MODES, ids=["split", "split-event", "packed", "packed-event"])
def driver(request: pytest.FixtureRequest, transport: type[Driver]) -> Driver:
    packed, event_idx = request.param
    return transport(Echo(), packed=packed, event_idx=event_idx)


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_chains_of_all_shapes_come_back(driver: Driver, indirect: bool, seed: int) -> None:
    chance = random.Random(seed)
    with driver:
        ring, memory = driver.rings[1], driver.memory
        for _ in range(300):
            want = {}
            for number in range(chance.randint(1, 4)):
                base = BUFFERS + number * 0x10000
                text = bytes(chance.choices(b"abcdefgh", k=chance.randint(1, 50)))
                cut = chance.randint(1, len(text))
                memory.write(base, text)
                buffers = [(base, cut, False)]
                if cut < len(text):
                    buffers.append((base + cut, len(text) - cut, False))
                room = chance.randint(1, 60)
                buffers.append((base + 0x1000, room, True))
                if chance.random() < 0.3:
                    buffers.append((base + 0x1000 + room, 7, True))
                    room += 7
                table = base + 0x8000 if indirect else 0
                want[ring.add(buffers, indirect=table)] = (base, text.upper()[:room])
            driver.kick(1)
            done = ring.used()
            assert dict(done).keys() == want.keys()
            for ident, written in done:
                base, text = want[ident]
                assert written == len(text)
                assert memory.read(base + 0x1000, written) == text
            assert driver.take_interrupts() == 1


def test_a_batch_of_long_chains_is_short(transport: type[Driver]) -> None:
    """What is made of one batch, which other machines of the process wait for, is bounded."""
    for packed in (False, True):
        with transport(Echo(), packed=packed, size=16) as driver:
            ring, queue = driver.rings[1], driver.device.slots[1].queue
            assert queue is not None
            want = [
                ring.add([(BUFFERS, 1, False)] * CHAIN_MAX, indirect=BUFFERS + 0x10000)
                for _ in range(16)
            ]
            batches = []
            while chains := queue.pop_batch():
                batches.append([chain.head for chain in chains])
            assert [head for batch in batches for head in batch] == want
            assert max(map(len, batches)) * CHAIN_MAX <= BATCH_BUFFERS


def test_no_interrupt_where_none_is_wanted(driver: Driver) -> None:
    with driver:
        ring = driver.rings[0]
        ring.want_interrupts(False)
        ring.add([(BUFFERS, 4, True)])
        driver.kick()
        assert driver.take_interrupts() == 0
        assert len(ring.used()) == 1


def test_chains_come_back_in_any_order(driver: Driver) -> None:
    with driver:
        device, ring = driver.device, driver.rings[0]
        assert isinstance(device, Echo)
        device.held = []
        want = [ring.add([(BUFFERS + 64 * n, 3, False), (BUFFERS + 64 * n + 8, 9, True)])
                for n in range(5)]  # fmt: skip
        driver.kick()
        assert ring.used() == []
        order = [3, 0, 4, 1, 2]
        for number in order:
            device.finish(*device.held[number], number)
        assert ring.used() == [(want[number], number) for number in order]


def test_finished_after_a_reset_is_dropped(driver: Driver) -> None:
    with driver:
        device = driver.device
        assert isinstance(device, Echo)
        device.held = []
        driver.rings[0].add([(BUFFERS, 4, True)])
        driver.kick()
        held, device.held = device.held, None
        driver.start()
        device.finish(*held[0], 4)
        assert driver.rings[0].used() == []
        driver.rings[0].add([(BUFFERS, 4, True)])
        driver.kick()
        assert len(driver.rings[0].used()) == 1


def test_one_queue_reset_leaves_the_other(driver: Driver) -> None:
    with driver:
        from vmm.virtio import mmio

        for _ in range(5):
            driver.rings[1].add([(BUFFERS, 4, True)])
            driver.kick(1)
        assert len(driver.rings[1].used()) == 5
        old = driver.rings[1]
        driver.write(mmio.QUEUE_SEL, 0)
        driver.write(mmio.QUEUE_RESET, 1)
        assert driver.read(mmio.QUEUE_RESET) == 0
        assert driver.read(mmio.QUEUE_READY) == 0
        ring = driver.rings[:]
        driver.enable(0)
        driver.rings = [driver.rings[0], ring[1]]
        for index in (0, 1):
            driver.rings[index].add([(BUFFERS, 4, True)])
            driver.kick(index)
            assert len(driver.rings[index].used()) == 1
        assert driver.rings[1] is old


def test_notifies_are_asked_for_only_when_idle(driver: Driver) -> None:
    with driver:
        ring = driver.rings[0]
        for _ in range(40):
            ring.add([(BUFFERS, 4, True)])
            assert ring.wants_notify()
            driver.kick()
            assert len(ring.used()) == 1


def test_a_queue_goes_on_where_it_was_saved(driver: Driver) -> None:
    with driver:
        device, ring = driver.device, driver.rings[0]
        for _ in range(21):
            ring.add([(BUFFERS, 4, True)])
            driver.kick()
            ring.used()
        state = driver.transport.save()
        again = Echo()
        again.memory = driver.memory
        driver.transport.device = again
        driver.transport.restore(state)
        again.interrupt = device.interrupt
        driver.kick()
        assert ring.used() == []  # not before the machine goes on
        driver.transport.resume()
        ring.add([(BUFFERS, 4, True)])
        driver.kick()
        assert len(ring.used()) == 1
        assert again.driver_features == driver.features


@pytest.mark.parametrize(("event", "new", "old", "needed"), [
    (0, 1, 0, True), (1, 1, 0, False), (4, 6, 3, True), (3, 6, 3, True), (6, 6, 3, False),
    (2, 6, 3, False), (0xFFFF, 0, 0xFFFF, True), (0xFFFE, 1, 0xFFFF, False), (0, 2, 0xFFF0, True),
])  # fmt: skip
def test_need_event(event: int, new: int, old: int, needed: bool) -> None:
    assert need_event(event, new, old) is needed


@pytest.mark.parametrize("size", [0, 3, 100])
def test_a_split_queue_is_a_power_of_two(size: int) -> None:
    with Driver(Echo()) as driver, pytest.raises(QueueError, match="not a power of two"):
        SplitQueue(driver.memory, size, 0, 0x1000, 0x2000)


def test_features_are_checked(transport: type[Driver]) -> None:
    from vmm.virtio import mmio

    with transport(Echo()) as driver:
        driver.write(mmio.STATUS, 0)
        driver.write(mmio.STATUS, 3)
        driver.write(mmio.DRIVER_FEATURES_SEL, 1)
        driver.write(mmio.DRIVER_FEATURES, 1 << 31)  # bit 63: never offered
        driver.write(mmio.STATUS, 3 | spec.FEATURES_OK)
        assert driver.read(mmio.STATUS) == 3
        driver.write(mmio.DRIVER_FEATURES, 0)  # a legacy driver: no VERSION_1
        driver.write(mmio.STATUS, 3 | spec.FEATURES_OK)
        assert driver.read(mmio.STATUS) == 3
        driver.write(mmio.STATUS, 3 | spec.DRIVER_OK)
        assert not driver.read(mmio.STATUS) & spec.DRIVER_OK

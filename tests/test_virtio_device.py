"""vmm/virtio/device.py: status, features, reset with requests under way, state."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.virtio_driver import BUFFERS, Driver
from tests.support.virtio_pci import PciDriver
from vmm.errors import ShapeError
from vmm.virtio import mmio, spec
from vmm.virtio.device import VirtioDevice
from vmm.virtio.queue import Chain, VirtQueue

READY = spec.ACKNOWLEDGE | spec.DRIVER | spec.FEATURES_OK | spec.DRIVER_OK


class Recorder(VirtioDevice):
    """Remembers what it is told; `hook` is called in each request, `keep` keeps all chains."""

    ID = 63
    FEATURES = 1 << 5
    QUEUES = (64, 8)

    def __init__(self) -> None:
        super().__init__("recorder")
        self.config[:] = bytes(range(16))
        self.log: list[str] = []
        self.written: list[tuple[int, bytes]] = []
        self.hook: Callable[[], None] = lambda: None
        self.keep = False
        self.kept: list[tuple[VirtQueue, Chain]] = []

    def request(self, index: int, chain: Chain) -> int | None:
        self.hook()
        self.log.append(f"request {index}")
        if self.keep:
            queue = self.slots[index].queue
            assert queue is not None
            self.kept.append((queue, chain))
            return None
        return chain.write(b"done")

    def started(self) -> None:
        self.log.append("started")

    def stopped(self) -> None:
        self.log.append("stopped")

    def drain(self) -> None:
        self.log.append("drain")

    def queue_stopped(self, index: int) -> None:
        self.log.append(f"queue {index} stopped")

    def config_written(self, offset: int, data: bytes) -> None:
        self.written.append((offset, data))


@pytest.fixture(params=[Driver, PciDriver], ids=["mmio", "pci"])
def transport(request: pytest.FixtureRequest) -> type[Driver]:
    kind: type[Driver] = request.param
    return kind


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def driver(request: pytest.FixtureRequest, transport: type[Driver]) -> Iterator[Driver]:
    with transport(Recorder(), packed=request.param) as each:
        yield each


def recorder(driver: Driver) -> Recorder:
    assert isinstance(driver.device, Recorder)
    driver.device.log.clear()
    return driver.device


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_only_a_reset_clears_status_bits(driver: Driver) -> None:
    device = recorder(driver)
    driver.write(mmio.STATUS, spec.ACKNOWLEDGE)
    assert driver.read(mmio.STATUS) == READY
    driver.write(mmio.STATUS, READY)
    assert device.log == []  # it has started already
    driver.write(mmio.STATUS, 0)
    assert driver.read(mmio.STATUS) == 0
    assert device.log[-1] == "stopped"


def test_features_do_not_change_while_it_runs(driver: Driver) -> None:
    device = recorder(driver)
    before = device.driver_features
    driver.write(mmio.STATUS, spec.ACKNOWLEDGE)  # no way back to negotiation
    driver.write(mmio.DRIVER_FEATURES_SEL, 0)
    driver.write(mmio.DRIVER_FEATURES, 0)
    assert device.driver_features == before


def test_a_driver_cannot_say_needs_reset(driver: Driver) -> None:
    device = recorder(driver)
    errors: list[str] = []
    device.on_error = errors.append
    driver.write(mmio.STATUS, READY | spec.DEVICE_NEEDS_RESET)
    assert driver.read(mmio.STATUS) == READY
    driver.rings[0].add([(1 << 40, 4, True)])
    driver.kick()
    assert driver.read(mmio.STATUS) == READY | spec.DEVICE_NEEDS_RESET
    assert errors == [
        "recorder: queue 0: descriptor 0x10000000000+0x4 is outside guest memory; "
        "the driver must reset the device"
    ]
    driver.kick(1)
    assert device.log == []


def test_the_first_driver_ok_counts_once(driver: Driver) -> None:
    device = recorder(driver)
    for _ in range(50):
        driver.negotiate()
        device.log.clear()
        barrier = threading.Barrier(4)
        connected: list[int] = []
        driver.transport.on_driver_ok = lambda connected=connected: connected.append(1)

        def go(barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            driver.write(mmio.STATUS, READY)

        threads = [in_thread(go) for _ in range(4)]
        for thread in threads:
            thread.join()
        assert device.log == ["started"]
        assert connected == [1]


def test_a_reset_waits_for_the_request_being_served(driver: Driver) -> None:
    """It drains after that, lest what the request left behind writes to the next driver."""
    device = recorder(driver)
    reached, go = threading.Event(), threading.Event()

    def hook() -> None:
        reached.set()
        assert go.wait(20)

    device.hook = hook
    driver.rings[0].add([(BUFFERS, 4, True)])
    serving = in_thread(driver.kick)
    assert reached.wait(20)
    resetting = in_thread(lambda: driver.write(mmio.STATUS, 0))
    resetting.join(0.05)
    assert resetting.is_alive()
    go.set()
    resetting.join(20)
    serving.join(20)
    assert device.log == ["request 0", "drain", "stopped"]


def test_who_waits_is_let_in_after_the_request_under_way(driver: Driver) -> None:
    device, ring = recorder(driver), driver.rings[0]

    def hook() -> None:
        device.quiet = len(device.log) == 2  # set while the third is under way

    device.hook = hook
    ids = [ring.add([(BUFFERS, 4, True)]) for _ in range(8)]
    driver.kick()
    assert [ident for ident, _ in ring.used()] == ids[:3]
    device.hook = lambda: None
    device.quiet = False
    driver.kick()
    assert [ident for ident, _ in ring.used()] == ids[3:]


def test_resets_at_the_same_time(driver: Driver) -> None:
    """Of the device and of its queues, by vCPUs that know nothing of each other."""
    device, ended = recorder(driver), []

    def work(registers: list[tuple[int, int]]) -> None:
        for _ in range(200):
            for offset, value in registers:
                driver.write(offset, value)
        ended.append(registers)

    threads = [
        in_thread(lambda: work([(mmio.STATUS, 0), (mmio.STATUS, READY)])),
        in_thread(lambda: work([(mmio.QUEUE_READY, 1), (mmio.QUEUE_READY, 0)])),
        in_thread(lambda: work([(mmio.QUEUE_NOTIFY, 0), (mmio.QUEUE_NOTIFY, 1)])),
    ]
    for thread in threads:
        thread.join(60)
    assert len(ended) == 3
    assert not device.quiet
    driver.start()
    driver.rings[0].add([(BUFFERS, 4, True)])
    driver.kick()
    assert len(driver.rings[0].used()) == 1


def test_more_chains_than_the_ring_holds(driver: Driver) -> None:
    """A driver that makes chains available again before it has them back would otherwise have the
    monitor remember any number of them."""
    device, memory, size = recorder(driver), driver.memory, driver.size
    device.keep = True
    ring = driver.rings[0]
    for _ in range(size):
        ring.add([(BUFFERS, 4, True)])
    driver.kick()
    assert len(device.kept) == size
    if driver.packed:
        memory.write_u16(ring.desc + 14, 2 | 1 << 15)  # the first, as if in the next round
    else:
        memory.write_u16(ring.driver + 2, size + 1)
    driver.kick()
    assert len(device.kept) == size
    assert driver.read(mmio.STATUS) & spec.DEVICE_NEEDS_RESET


def test_all_of_the_ring_can_be_under_way(driver: Driver) -> None:
    device, ring = recorder(driver), driver.rings[0]
    device.keep = True
    for _ in range(5):
        device.kept.clear()
        want = [ring.add([(BUFFERS, 4, True), (BUFFERS + 8, 4, True)]) for _ in range(8)]
        driver.kick()
        assert len(device.kept) == 8
        for queue, chain in reversed(device.kept):
            device.finish(0, queue, chain, 4)
        assert [ident for ident, _ in ring.used()] == want[::-1]


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        (0, {}), (65, {}), (0x10010, {}), (12, {}), (16, {"desc": 8}), (16, {"driver": 1}),
        (16, {"device": 2}), (16, {"desc": 1 << 63}), (16, {"driver": (1 << 64) - 2}),
        (16, {"device": (8 << 20) - 4}),
    ],
)  # fmt: skip
def test_a_ring_that_cannot_be(size: int, fields: dict[str, int]) -> None:
    registers = {"desc": mmio.QUEUE_DESC, "driver": mmio.QUEUE_DRIVER, "device": mmio.QUEUE_DEVICE}
    with Driver(Recorder()) as driver:
        driver.negotiate()
        driver.write(mmio.QUEUE_NUM, size)
        for name, gpa in ({"desc": 0x1000, "driver": 0x2000, "device": 0x3000} | fields).items():
            driver.write(registers[name], gpa & 0xFFFFFFFF)
            driver.write(registers[name] + 4, gpa >> 32)
        driver.write(mmio.QUEUE_READY, 1)
        assert driver.read(mmio.QUEUE_READY) == 0
        assert driver.read(mmio.STATUS) & spec.DEVICE_NEEDS_RESET
        driver.start()
        driver.rings[0].add([(BUFFERS, 4, True)])
        driver.kick()
        assert driver.rings[0].used()[0][1] == 4


def test_no_queue_before_features(driver: Driver) -> None:
    driver.write(mmio.STATUS, 0)
    driver.write(mmio.STATUS, spec.ACKNOWLEDGE | spec.DRIVER)
    driver.write(mmio.QUEUE_READY, 1)
    assert driver.read(mmio.QUEUE_READY) == 0


def test_a_queue_is_served_from_driver_ok_on(driver: Driver) -> None:
    device = recorder(driver)
    driver.negotiate()
    driver.enable(0)
    driver.rings[0].add([(BUFFERS, 4, True)])
    driver.kick()
    assert "request 0" not in device.log
    driver.write(mmio.STATUS, READY)
    assert device.log[-2:] == ["started", "request 0"]
    assert len(driver.rings[0].used()) == 1


def test_what_the_configuration_space_takes(driver: Driver) -> None:
    device = recorder(driver)
    assert [device.read_config(at, 4) for at in (0, 13, 15, 16, 1000)] == [
        0x03020100, 0x0F0E0D, 0x0F, 0, 0,
    ]  # fmt: skip
    driver.write(mmio.CONFIG + 2, 0x12345678, 2)
    driver.write(mmio.CONFIG + 14, 1, 4)  # beyond its end
    driver.write(mmio.CONFIG + 8, (1 << 64) - 1, 8)
    assert device.written == [(2, b"\x78\x56"), (8, b"\xff" * 8)]


def test_a_change_is_told_to_a_driver_that_runs(driver: Driver) -> None:
    driver.device.config_changed()
    assert driver.take_interrupts() == 2
    driver.write(mmio.STATUS, 0)
    driver.device.config_generation = 255
    driver.device.config_changed()
    assert driver.take_interrupts() == 0
    assert driver.read(mmio.CONFIG_GENERATION) == 0


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"queues": []}, "state of recorder: not 2 queues"),
        ({"queues": None}, "state of recorder: not 2 queues"),
        ({"status": "15"}, "status is '15', not an integer"),
        ({"features": None}, "features is None, not an integer"),
    ],
)
def test_a_state_that_is_not_its_own(driver: Driver, change: dict[str, object], error: str) -> None:
    state = driver.device.save()
    with pytest.raises(ValueError, match=error):
        driver.device.restore(state | change)


def test_a_saved_ring_outside_memory(driver: Driver) -> None:
    state = driver.device.save()
    queues = state["queues"]
    assert isinstance(queues, list)
    queues[0]["desc"] = 1 << 40
    with pytest.raises(ShapeError, match=r"state of recorder: .* outside guest memory"):
        driver.device.restore(state)

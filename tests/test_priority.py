"""vmm/priority.py: neighbours that keep their devices busy do not hold up a machine's pause."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks import floods
from tests.support.virtio_driver import BUFFERS, Driver
from vmm import Machine, priority
from vmm.block.raw import RawImage
from vmm.virtio import kernel
from vmm.virtio.blk import Block
from vmm.virtio.device import VirtioDevice
from vmm.virtio.queue import Chain
from vmm.virtio.throttle import Throttle

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(60)]


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(priority, "AT_MOST", 30.0)
    return 30.0


def served(machine: Machine) -> tuple[int, ...]:
    """The used indices of the machine's queues."""
    return tuple(machine.memory.read_u16(floods.Flood.avail(index) + 0x1002) for index in range(6))


def processor_time(before: set[threading.Thread]) -> float:
    """Seconds that threads which came after `before`, but for vCPUs', have run."""
    total = 0
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith("vcpu"):
            path = Path(f"/proc/self/task/{thread.native_id}/schedstat")
            total += int(path.read_text().split()[0])
    return total / 1e9


def stands_still(before: set[threading.Thread]) -> bool:
    used = processor_time(before)
    time.sleep(0.1)
    return processor_time(before) - used < 0.003


@pytest.mark.parametrize(
    "name", sorted(floods.FLOODS.keys() - {"notifies", "registers", "large reads"})
)
@pytest.mark.usefixtures("patience")
def test_who_serves_a_flood_gives_way(name: str, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with floods.machine(name, str(tmp_path)) as machine:
        machine.start()

        def goes_on() -> None:
            limit, used = time.monotonic() + 20, served(machine)
            while served(machine) == used:
                assert time.monotonic() < limit, "it does not serve"
                time.sleep(0.01)

        goes_on()
        for _ in range(2):
            with priority.first:
                limit = time.monotonic() + 20
                while not stands_still(before):
                    assert time.monotonic() < limit, "it does not give way"
            goes_on()
        assert machine.exit is None
        assert not machine.event_log[1:], "the flood is no driver's: the device has stopped it"


class Asked(VirtioDevice):
    """Somebody begins to go first while request number `at` is served."""

    ID, QUEUES = 63, (64,)

    def __init__(self, at: int, throttled: bool) -> None:
        super().__init__("asked")
        self.at, self.asked = at, 0
        self.throttle = Throttle(self, lambda chain: 1) if throttled else None
        if self.throttle is not None:
            self.throttle.limit.change(ops=1e6)

    def notify(self, index: int) -> None:
        if self.throttle is not None:
            self.throttle.serve(index)
        else:
            super().notify(index)

    def request(self, index: int, chain: Chain) -> int:
        self.asked += 1
        if self.asked == self.at:
            priority.first.__enter__()
        return 0


@pytest.mark.parametrize("throttled", [False, True], ids=["plain", "throttled"])
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.usefixtures("patience")
def test_a_batch_is_left_and_gone_on_with(at: int, throttled: bool) -> None:
    with Driver(Asked(at, throttled)) as driver:
        device = driver.device
        assert isinstance(device, Asked)
        for _ in range(3):
            driver.rings[0].add([(BUFFERS, 16, True)])
        thread = threading.Thread(target=driver.kick)
        thread.start()
        limit = time.monotonic() + 20
        while not priority.wanted:
            assert time.monotonic() < limit
        thread.join(0.1)
        try:
            assert thread.is_alive(), "it does not give way"
            assert device.asked == at
            assert len(driver.rings[0].used()) == at, "what is done is not told"
            lock = device.slots[0].lock
            assert lock.acquire(timeout=20), "it keeps its queue meanwhile"
            lock.release()
        finally:
            priority.first.__exit__()
        thread.join(20)
        assert not thread.is_alive()
        assert device.asked == 3
        assert len(driver.rings[0].used()) == 3 - at


@pytest.mark.usefixtures("patience")
def test_the_compiled_disk_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel.library() is None:
        pytest.skip("not compiled here")
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    calls: list[int] = []

    def serve(ring: object, function: object, argument: object) -> int:
        calls.append(0)
        if len(calls) == 1:
            priority.first.__enter__()
            return kernel.MORE
        return kernel.IDLE

    with Driver(Block(RawImage(str(tmp_path / "disk")))) as driver:
        monkeypatch.setattr(kernel.KernelRing, "serve", serve)
        thread = threading.Thread(target=driver.kick)
        thread.start()
        limit = time.monotonic() + 20
        while not calls:
            assert time.monotonic() < limit
        thread.join(0.1)
        try:
            assert thread.is_alive()
            assert len(calls) == 1
        finally:
            priority.first.__exit__()
        thread.join(20)
        assert len(calls) == 2


def test_the_lock_changes_hands_sooner_meanwhile() -> None:
    before = sys.getswitchinterval()
    with priority.first:
        assert sys.getswitchinterval() == pytest.approx(priority.SWITCH_INTERVAL)
        with priority.first:
            pass
        assert priority.wanted
        assert sys.getswitchinterval() == pytest.approx(priority.SWITCH_INTERVAL)
    assert not priority.wanted
    assert sys.getswitchinterval() == before


def test_a_shorter_interval_of_the_program_stays() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(priority.SWITCH_INTERVAL / 2)
    try:
        with priority.first:
            assert sys.getswitchinterval() < priority.SWITCH_INTERVAL
        assert sys.getswitchinterval() == pytest.approx(priority.SWITCH_INTERVAL / 2)
    finally:
        sys.setswitchinterval(before)


def test_nobody_gives_way_for_long() -> None:
    """Who goes first may wait for ever, for a function of the program."""
    gone = threading.Event()
    with priority.first:
        thread = threading.Thread(target=lambda: (priority.give_way(), gone.set()))
        thread.start()
        assert gone.wait(20)
        thread.join()
        priority.give_way()  # at once: the time is over
    priority.give_way()

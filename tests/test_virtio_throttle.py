"""vmm/virtio/{throttle,net_limit,rate}.py: what a limit holds back waits, and goes on."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.net_guest import MAC, NetGuest, random_frame
from tests.support.virtio_driver import BUFFERS, Driver
from tests.test_virtio_net import Wire
from vmm.block.drive import Drive
from vmm.block.raw import RawImage
from vmm.errors import UsageError
from vmm.net.config import Net
from vmm.virtio import blk, mmio, spec
from vmm.virtio import net_spec as n
from vmm.virtio.blk import Block
from vmm.virtio.net import Nic

SLOW = 1e-6
"""A second: nothing comes in the time a test takes."""


@pytest.fixture(params=[(False, False), (True, True)], ids=["split", "packed-event"])
def modes(request: pytest.FixtureRequest) -> dict[str, bool]:
    packed, event_idx = request.param
    return {"packed": packed, "event_idx": event_idx}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(3).randbytes(1 << 20))
    return path


@pytest.fixture
def disk(path: Path, modes: dict[str, bool]) -> Iterator[Driver]:
    with Driver(Block(RawImage(str(path)), queues=2), size=64, **modes) as driver:
        yield driver


def device(driver: Driver) -> Block:
    assert isinstance(driver.device, Block)
    return driver.device


def ask(driver: Driver, count: int, size: int = 512, index: int = 0) -> None:
    """`count` reads, and one notify."""
    for number in range(count):
        at = BUFFERS + number * 0x10000
        driver.memory.write(at, struct.pack("<IIQ", blk.T_IN, 0, number))
        status = at + 0x8000 + index
        driver.rings[index].add([(at, 16, False), (at + 0x100, size, True), (status, 1, True)])
    driver.kick(index)


def come(driver: Driver, count: int, index: int = 0) -> None:
    """Wait until exactly `count` are back."""
    back, limit = 0, time.monotonic() + 30
    while back < count:
        assert time.monotonic() < limit, f"{back} of {count}"
        back += len(driver.rings[index].used())
        time.sleep(0.001)
    assert back == count


def test_requests_wait_for_the_limit(disk: Driver) -> None:
    device(disk).limit.change(ops=SLOW, burst_ops=4)
    ask(disk, 10)
    come(disk, 4)
    assert not disk.rings[0].wants_notify()  # it will be looked at without
    disk.kick()
    assert disk.rings[0].used() == []
    device(disk).limit.change()
    come(disk, 6)
    ask(disk, 10)
    come(disk, 10)


def test_time_brings_them_on(disk: Driver) -> None:
    device(disk).limit.change(ops=200, burst_ops=1)
    ask(disk, 10)
    ask(disk, 10, index=1)
    come(disk, 10)
    come(disk, 10, index=1)


def test_bytes_are_counted(disk: Driver) -> None:
    device(disk).limit.change(bytes=SLOW, burst_bytes=8192)
    ask(disk, 10, 4096)
    come(disk, 2)
    device(disk).limit.change(bytes=1 << 30)
    come(disk, 8)


def test_queues_share_the_limit(disk: Driver) -> None:
    device(disk).limit.change(ops=SLOW, burst_ops=3)
    ask(disk, 2)
    ask(disk, 2, index=1)
    come(disk, 2)
    come(disk, 1, index=1)


def test_a_reset_forgets_what_waits(disk: Driver) -> None:
    device(disk).limit.change(ops=SLOW, burst_ops=1)
    ask(disk, 5)
    come(disk, 1)
    disk.start()
    device(disk).limit.change(ops=1000)
    ask(disk, 3)
    come(disk, 3)


def test_what_waits_is_in_the_saved_ring(disk: Driver, path: Path) -> None:
    device(disk).limit.change(ops=SLOW, burst_ops=1)
    ask(disk, 5)
    come(disk, 1)
    state = disk.transport.save()
    device(disk).close()
    again = Block(RawImage(str(path)), queues=2)
    again.memory, again.interrupt = disk.memory, disk.device.interrupt
    disk.device = disk.transport.device = again
    disk.transport.restore(state)
    disk.transport.resume()
    come(disk, 4)


def test_a_broken_ring_under_a_limit(disk: Driver) -> None:
    device(disk).limit.change(ops=1000)
    disk.rings[0].add([(1 << 40, 4, True)])
    disk.kick()
    assert disk.read(mmio.STATUS) & spec.DEVICE_NEEDS_RESET
    disk.start()
    ask(disk, 3)
    come(disk, 3)


def test_a_request_of_all_memory_counts_as_the_largest_possible(disk: Driver) -> None:
    device(disk).limit.change(bytes=1 << 40)
    at = 0x600000
    disk.rings[0].add([(BUFFERS, 16, False), *[(0, 8 << 20, True)] * 20, (at, 1, True)])
    disk.kick()
    ask(disk, 1)
    come(disk, 2)


# --- network cards --------------------------------------------------------------------------------


@pytest.fixture
def card(modes: dict[str, bool]) -> Iterator[tuple[NetGuest, Wire]]:
    wire = Wire()
    with NetGuest(Nic(wire.backend, mac=MAC), **modes) as guest:
        yield guest, wire
    wire.sock.close()


def transmit(guest: NetGuest, frames: list[bytes]) -> None:
    for number, frame in enumerate(frames):
        at = 0x600000 + 0x1000 * number
        guest.memory.write(at, bytes(n.HEADER_SIZE) + frame)
        guest.rings[1].add([(at, n.HEADER_SIZE + len(frame), False)])
    guest.kick(1)


@pytest.mark.parametrize("limit", [
    {"ops": SLOW, "burst_ops": 3}, {"bytes": SLOW, "burst_bytes": 300},
])  # fmt: skip
def test_frames_from_the_guest_wait(card: tuple[NetGuest, Wire], limit: dict[str, float]) -> None:
    guest, wire = card
    guest.nic.tx_limit.change(**limit)
    frames = [random_frame(100) for _ in range(10)]
    transmit(guest, frames)
    assert [wire.receive() for _ in range(3)] == frames[:3]
    wire.sock.settimeout(0.05)
    with pytest.raises(TimeoutError):
        wire.receive()
    wire.sock.settimeout(20)
    wire.send(frames[0])
    assert guest.frame() == frames[0]  # the other direction goes on
    guest.nic.tx_limit.change(ops=100, burst_ops=1)
    assert [wire.receive() for _ in range(7)] == frames[3:]


@pytest.mark.parametrize("limit", [
    {"ops": SLOW, "burst_ops": 3}, {"bytes": SLOW, "burst_bytes": 300},
])  # fmt: skip
def test_frames_to_the_guest_wait(card: tuple[NetGuest, Wire], limit: dict[str, float]) -> None:
    guest, wire = card
    guest.nic.rx_limit.change(**limit)
    frames = [random_frame(100) for _ in range(10)]
    wire.send(*frames)
    assert [guest.frame() for _ in range(3)] == frames[:3]
    assert guest.silent(0.05)
    guest.send(frames[0])
    assert wire.receive() == frames[0]
    guest.nic.rx_limit.change(ops=100, burst_ops=1)
    assert [guest.frame() for _ in range(7)] == frames[3:]
    guest.nic.rx_limit.change()
    wire.send(*frames)
    assert [guest.frame() for _ in range(10)] == frames


def test_what_a_full_socket_turned_away_is_not_paid_for(card: tuple[NetGuest, Wire]) -> None:
    guest, wire = card
    guest.nic.tx_limit.change(ops=SLOW, burst_ops=100)
    frames = [random_frame(4000) for _ in range(60)]
    transmit(guest, frames)  # more than the socket holds
    assert [wire.receive() for _ in range(60)] == frames
    back, limit = 0, time.monotonic() + 30
    while back < 60:
        assert time.monotonic() < limit
        back += len(guest.rings[1].used())
    transmit(guest, frames[:40])
    assert [wire.receive() for _ in range(40)] == frames[:40]


# --- configuration --------------------------------------------------------------------------------


def test_options_reach_the_devices(path: Path) -> None:
    disk = Drive.parse(f"{path},bps=1M,iops=100,burst=2M,iops-burst=5").open(0)
    assert isinstance(disk, Block)
    assert disk.limit.rates == (1 << 20, 100)
    assert disk.limit.take(1 << 40) == 0.0
    assert disk.limit.take(1) > 1
    disk.close()
    nic = Net.parse("lan=limits,rx-bps=10K,tx-pps=7").open(0)
    assert nic is not None
    assert (nic.rx_limit.rates, nic.tx_limit.rates) == ((10240, 0), (0, 7))
    nic.close()


def test_a_disk_without_a_limit_has_none(path: Path) -> None:
    disk = Drive(str(path)).open(0)
    assert isinstance(disk, Block)
    assert disk._throttle is None
    disk.close()


@pytest.mark.parametrize(("values", "says"), [
    ({"bps": -1}, "bps=-1 is no number"), ({"iops": 1 << 60}, "is no number above 0"),
    ({"bps": ""}, "bps= is no number"), ({"iops": 1.5}, "iops=1.5 is not a whole number"),
    ({"burst": 5}, "burst= goes with bps="), ({"iops_burst": 5}, "iops-burst= goes with iops="),
])  # fmt: skip
def test_rates_that_cannot_be(values: dict[str, int], says: str) -> None:
    with pytest.raises(UsageError, match=f"--drive x: .*{says}"):
        Drive("x", **values)  # type: ignore[arg-type]

"""vmm/virtio/rng.py: bytes for every request, no faster than the limit says."""

from __future__ import annotations

import time

import pytest

from tests.support.virtio_driver import BUFFERS, Driver
from vmm.errors import UsageError
from vmm.virtio.limit import Limit
from vmm.virtio.rng import REQUEST_MAX, Entropy, parse


@pytest.mark.parametrize("packed", [False, True])
def test_requests_are_filled(packed: bool) -> None:
    with Driver(Entropy(), packed=packed) as driver:
        ring = driver.rings[0]
        driver.memory.fill(BUFFERS, 0x1000)
        ident = ring.add([(BUFFERS, 100, True), (BUFFERS + 0x800, 28, True)])
        driver.kick()
        assert ring.used() == [(ident, 128)]
        assert len(set(driver.memory.read(BUFFERS, 100))) > 20
        ring.add([(BUFFERS, 2 * REQUEST_MAX, True)])
        ring.add([(BUFFERS, 16, False)])  # nothing to write: nothing given
        driver.kick()
        assert [size for _, size in ring.used()] == [REQUEST_MAX, 0]


def collect(driver: Driver, count: int, size: int) -> float:
    """Seconds until `count` requests of `size` bytes, one after the other, are answered."""
    begin = time.monotonic()
    for _ in range(count):
        driver.rings[0].add([(BUFFERS, size, True)])
        driver.kick()
        while not (used := driver.rings[0].used()):
            assert time.monotonic() < begin + 20
            time.sleep(0.001)
        assert 0 < used[0][1] <= size
    return time.monotonic() - begin


def test_the_rate_is_kept_and_can_be_changed() -> None:
    device = Entropy(limit=Limit(bytes=1000))
    with Driver(device) as driver:
        # 100 at once (the burst), then 1000 a second; a busy host only makes it slower.
        assert collect(driver, 5, 100) > 0.25
        device.limit.change()
        assert collect(driver, 100, 100) < 10


def test_a_reset_forgets_who_waits() -> None:
    device = Entropy(limit=Limit(bytes=10))
    with Driver(device) as driver:
        for _ in range(4):
            driver.rings[0].add([(BUFFERS, 100, True)])
        driver.kick()
        driver.start()
        time.sleep(0.2)
        assert driver.rings[0].used() == []
        device.limit.change()
        assert collect(driver, 4, 100) < 10


@pytest.mark.parametrize("packed", [False, True])
def test_who_waits_is_in_the_ring_again_after_a_save(packed: bool) -> None:
    device = Entropy(limit=Limit(bytes=1, burst_bytes=1))
    with Driver(device, packed=packed) as driver:
        for _ in range(4):
            driver.rings[0].add([(BUFFERS, 100, True)])
        driver.kick()
        before = len(driver.rings[0].used())
        state = device.save()
        other = Entropy()
        other.memory, other.interrupt = driver.memory, device.interrupt
        device.close()
        other.restore(state)
        other.resume()
        driver.transport.device = other
        driver.kick()
        assert before + len(driver.rings[0].used()) == 4


@pytest.mark.parametrize(("text", "rate"), [("", 0), ("rate=100", 100), ("rate=64K", 65536)])
def test_parse(text: str, rate: int) -> None:
    assert parse(text).rates[0] == rate


@pytest.mark.parametrize("text", ["rate=", "rate=0", "rate=x", "speed=1", "rate", "rate=-1"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="--rng"):
        parse(text)

"""vmm/virtio/balloon.py: memory really goes back, and only what the guest has put in."""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from tests.support.virtio_driver import BUFFERS, Driver
from vmm.errors import StateError, UsageError
from vmm.layout import GIB, MIB, PAGE_SIZE
from vmm.memory import GuestMemory, Region
from vmm.virtio import balloon, mmio, spec
from vmm.virtio.balloon import F_PAGE_REPORTING, F_STATS_VQ, PFNS_MAX, TAGS, Balloon, runs

MODES = [(packed, event_idx) for packed in (False, True) for event_idx in (False, True)]
SIZE = 16 * MIB
PAGES = range(8 * MIB // PAGE_SIZE, SIZE // PAGE_SIZE)
"""Those no ring and no buffer of the driver's is in."""


def full(backing: str = "anonymous", size: int = SIZE) -> GuestMemory:
    """Memory with every page touched, that is in small pages."""
    memory = GuestMemory(size, backing)
    for region in memory.regions:
        region.map.madvise(15)  # MADV_NOHUGEPAGE
    memory.fill(0, SIZE, 0xAA)
    return memory


@pytest.fixture(params=MODES, ids=["split", "split-event", "packed", "packed-event"])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    packed, event_idx = request.param
    with Driver(Balloon(), memory=full(), packed=packed, event_idx=event_idx) as made:
        yield made


def resident(driver: Driver) -> int:
    return sum(region.resident() for region in driver.memory.regions)


def send(driver: Driver, queue: int, data: bytes, cut: int = 0) -> None:
    driver.memory.write(BUFFERS, data)
    buffers = [(BUFFERS, len(data), False)]
    if cut:
        buffers = [(BUFFERS, cut, False), (BUFFERS + cut, len(data) - cut, False)]
    driver.rings[queue].add(buffers)
    driver.kick(queue)
    assert driver.rings[queue].used()[0][1] == 0


def inflate(driver: Driver, pages: list[int], cut: int = 0) -> None:
    send(driver, 0, struct.pack(f"<{len(pages)}I", *pages), cut)


def test_inflated_pages_go_back(driver: Driver) -> None:
    chance, before = random.Random(1), resident(driver)
    assert before >= SIZE
    pages = chance.sample(PAGES, 500)
    for at in range(0, 500, 100):
        inflate(driver, pages[at : at + 100], cut=at % 7)
    assert before - resident(driver) == 500 * PAGE_SIZE
    device = driver.device
    assert isinstance(device, Balloon)
    assert device.given_back == 500 * PAGE_SIZE
    chosen = set(pages)
    for page in PAGES:  # no neighbour has lost anything
        want = 0 if page in chosen else 0xAA
        assert driver.memory.read(page * PAGE_SIZE, PAGE_SIZE) == bytes([want]) * PAGE_SIZE


def test_other_machines_do_not_wait_for_a_large_request(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python runs nobody else while it sorts, or is in madvise: both get little at once."""
    sorts: list[int] = []
    gives: list[int] = []

    def counted(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
        sorts.append(len(numbers))
        return runs(numbers)

    def counted_discard(region: Region, offset: int, size: int) -> int:
        gives.append(size)
        return size

    monkeypatch.setattr(balloon, "runs", counted)
    monkeypatch.setattr(balloon, "SLICE", 1 * MIB)
    monkeypatch.setattr(Region, "discard", counted_discard)
    pages = [*PAGES, *random.Random(2).sample(range(3 * PFNS_MAX), PFNS_MAX - len(PAGES))]
    inflate(driver, pages)
    assert len(sorts) > 10 and max(sorts) <= 4096
    assert sum(sorts) == len(pages)
    assert gives and max(gives) == 1 * MIB


def test_deflating_needs_nothing(driver: Driver) -> None:
    inflate(driver, [PAGES[0], PAGES[1]])
    send(driver, 1, struct.pack("<2I", PAGES[0], PAGES[1]))
    driver.memory.write(PAGES[0] * PAGE_SIZE, b"its own again")
    assert driver.memory.read(PAGES[0] * PAGE_SIZE, 13) == b"its own again"


@pytest.mark.parametrize("pfn", [SIZE // PAGE_SIZE, 0xFFFFFFFF, 0xC0000, 0x100000, 0x80000000])
def test_pages_outside_ram_are_ignored(driver: Driver, pfn: int) -> None:
    before = resident(driver)
    inflate(driver, [pfn, PAGES[5], pfn])
    assert before - resident(driver) == PAGE_SIZE
    assert not driver.read(mmio.STATUS) & spec.DEVICE_NEEDS_RESET


def test_a_run_is_cut_at_the_end_of_ram(driver: Driver) -> None:
    last = SIZE // PAGE_SIZE - 1
    before = resident(driver)
    inflate(driver, [last, last + 1, last + 2])
    assert before - resident(driver) == PAGE_SIZE


@pytest.mark.parametrize("data", [b"", b"\1", b"\1\2\3", b"\0\0\0\0\1"])
def test_odd_lengths(driver: Driver, data: bytes) -> None:
    send(driver, 0, data or b"\0")
    send(driver, 1, data or b"\0")
    assert not driver.read(mmio.STATUS) & spec.DEVICE_NEEDS_RESET


def test_too_many_numbers_ask_for_a_reset(driver: Driver) -> None:
    said: list[str] = []
    driver.device.on_error = said.append
    driver.rings[0].add([(0x200000, 4 * PFNS_MAX, False), (0x400000, 4, False)])
    driver.kick(0)
    assert "bytes of page numbers" in said[0]
    driver.start()
    inflate(driver, [PAGES[0]])


def test_pages_above_the_hole_are_found() -> None:
    memory = GuestMemory(3 * GIB + 64 * MIB)
    memory.regions[1].map.madvise(15)
    memory.fill(4 * GIB, 32 * MIB, 1)
    with Driver(Balloon(), memory=memory) as driver:
        first = 4 * GIB // PAGE_SIZE
        inflate(driver, [first, first + 1, first + 3, 3 * GIB // PAGE_SIZE])
        assert memory.regions[1].resident() == 32 * MIB - 3 * PAGE_SIZE


def test_a_memfds_pages_go_back_to_the_host() -> None:
    with Driver(Balloon(), memory=full("memfd")) as driver:
        import os

        fd = driver.memory.regions[0].fd
        before = os.fstat(fd).st_blocks * 512
        inflate(driver, list(PAGES))
        assert before - os.fstat(fd).st_blocks * 512 == len(PAGES) * PAGE_SIZE
        assert driver.memory.read(PAGES[0] * PAGE_SIZE, 4) == bytes(4)
        driver.memory.write(PAGES[0] * PAGE_SIZE, b"back")
        assert driver.memory.read(PAGES[0] * PAGE_SIZE, 4) == b"back"


# --- reporting ------------------------------------------------------------------------------------


def test_reported_pages_go_back(driver: Driver) -> None:
    before = resident(driver)
    base = 8 * MIB
    driver.rings[3].add([(base, MIB, True), (base + 2 * MIB, MIB + 100, True),
                         (base + 5 * MIB + 1, 2 * PAGE_SIZE, True)])  # fmt: skip
    driver.kick(3)
    assert driver.rings[3].used()[0][1] == 0
    assert before - resident(driver) == 2 * MIB + PAGE_SIZE  # whole pages only
    assert driver.memory.read(base + 3 * MIB, 100) == b"\xaa" * 100
    assert driver.memory.read(base + 5 * MIB + 1, PAGE_SIZE - 1) == b"\xaa" * (PAGE_SIZE - 1)


def test_reports_are_on_the_third_queue_without_statistics() -> None:
    with Driver(Balloon(), memory=full(), without=1 << F_STATS_VQ) as driver:
        before = resident(driver)
        driver.rings[2].add([(8 * MIB, MIB, True)])
        driver.kick(2)
        assert before - resident(driver) == MIB
        with pytest.raises(StateError):
            assert isinstance(driver.device, Balloon)
            driver.device.stats()


def test_without_reporting_the_queue_is_dead() -> None:
    with Driver(Balloon(), memory=full(), without=1 << F_PAGE_REPORTING) as driver:
        before = resident(driver)
        driver.rings[3].add([(8 * MIB, MIB, True)])
        driver.kick(3)
        assert resident(driver) == before


# --- target and statistics ------------------------------------------------------------------------


def test_the_target_reaches_the_driver_and_its_answer_the_person(driver: Driver) -> None:
    device = driver.device
    assert isinstance(device, Balloon)
    driver.take_interrupts()
    device.target(4 * MIB + 5)
    assert driver.take_interrupts() & 2
    assert driver.read(mmio.CONFIG) == 4 * MIB // PAGE_SIZE
    assert (device.wanted, device.actual) == (4 * MIB, 0)
    driver.write(mmio.CONFIG + 4, 1000)
    assert device.actual == 1000 * PAGE_SIZE
    driver.write(mmio.CONFIG, 7)  # not the driver's to write
    assert device.wanted == 4 * MIB
    for size in (-1, SIZE + 1):
        with pytest.raises(UsageError, match="not from 0 to the machine's"):
            device.target(size)
    driver.start()
    assert (device.wanted, device.actual) == (4 * MIB, 0)


def stat(*values: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<HQ", tag, value) for tag, value in values)


def test_statistics(driver: Driver) -> None:
    device = driver.device
    assert isinstance(device, Balloon)
    ring = driver.rings[2]

    def fill(data: bytes) -> None:
        driver.memory.write(BUFFERS, data)
        driver.rings[2].add([(BUFFERS, len(data), False)])
        driver.kick(2)

    fill(stat((4, 111), (5, 222)))  # what Linux gives at first
    assert ring.used() == []
    got: list[dict[str, int]] = []
    for free in (333, 444):
        thread = threading.Thread(target=lambda: got.append(device.stats(10)))
        thread.start()
        deadline = time.monotonic() + 10
        while not ring.used():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        fill(stat((4, free), (6, 7), (99, 1)) + b"odd")
        thread.join(10)
        assert got.pop() == {"free_memory": free, "available_memory": 7}
    assert TAGS[6] == "available_memory"
    with pytest.raises(TimeoutError):
        device.stats(0.05)
    driver.start()
    with pytest.raises(TimeoutError):
        device.stats(0.05)
    fill(stat((4, 1)))
    state = device.save()
    other = Balloon()
    other.memory, other.interrupt = driver.memory, device.interrupt
    other.restore(state)
    other.resume()
    other.notify(2)
    assert driver.rings[2].used() == []  # it is held again


def test_two_statistics_buffers_are_one_too_many(driver: Driver) -> None:
    for _ in range(3):
        driver.rings[2].add([(BUFFERS, 10, False)])
        driver.kick(2)
    assert len(driver.rings[2].used()) == 2


@pytest.mark.parametrize(("numbers", "want"), [
    ([], []), ([0], [(0, 1)]), ([3, 1, 2], [(1, 3)]), ([5, 5, 5], [(5, 1)]),
    ([9, 1, 3, 2, 8], [(1, 3), (8, 2)]), ([0, 1, 0xFFFFFFFF], [(0, 2), (0xFFFFFFFF, 1)]),
])  # fmt: skip
def test_runs(numbers: list[int], want: list[tuple[int, int]]) -> None:
    assert list(runs(numbers)) == want

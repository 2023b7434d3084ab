"""vmm/virtio/blk.py: every request, any framing of it, bounds, errors, reset in flight."""

from __future__ import annotations

import errno
import itertools
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.virtio_driver import BUFFERS, Driver
from vmm.block.raw import RawImage
from vmm.errors import StateError
from vmm.virtio import blk, kernel, mmio, spec
from vmm.virtio.blk import Block

SIZE = 8 << 20
HEADER, STATUS, DATA = BUFFERS, BUFFERS + 0x100, BUFFERS + 0x1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    disk = tmp_path / "disk.img"
    disk.write_bytes(random.Random(1).randbytes(1 << 20))
    os.truncate(disk, SIZE)
    return disk


@pytest.fixture(
    params=[(False, False, False), (True, True, False), (False, True, True)],
    ids=["split", "packed-event", "kernel"],
)
def make(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Driver]]:
    packed, event_idx, in_c = request.param
    if not in_c:
        monkeypatch.setattr(kernel, "_loaded", [None])
    drivers: list[Driver] = []

    def driver(
        path: Path,
        *,
        queues: int = 1,
        image: RawImage | None = None,
        size: int = 16,
        **how: Any,
    ) -> Driver:
        disk = Block(image or RawImage(str(path), **how), serial="SN-1", queues=queues)
        drivers.append(Driver(disk, packed=packed, event_idx=event_idx, size=size))
        return drivers[-1]

    yield driver
    for each in drivers:
        each.__exit__()


def wait_used(driver: Driver, index: int = 0, count: int = 1) -> list[tuple[int, int]]:
    """`count` chains of queue `index`; some are finished by workers, later."""
    done: list[tuple[int, int]] = []
    limit = time.monotonic() + 20
    while len(done) < count:
        assert time.monotonic() < limit, f"{len(done)} of {count} requests came back"
        done += driver.rings[index].used()
        if len(done) < count:
            time.sleep(0.0005)
    return done


def submit(
    driver: Driver, kind: int, sector: int = 0, out: bytes = b"", into: int = 0, index: int = 0
) -> None:
    driver.memory.write(HEADER, struct.pack("<IIQ", kind, 0, sector))
    driver.memory.write_u8(STATUS, 0xAA)
    buffers = [(HEADER, 16, False)]
    if out:
        driver.memory.write(DATA, out)
        buffers.append((DATA, len(out), False))
    if into:
        buffers.append((DATA, into, True))
    driver.rings[index].add([*buffers, (STATUS, 1, True)])
    driver.kick(index)


def request(
    driver: Driver, kind: int, sector: int = 0, out: bytes = b"", into: int = 0
) -> tuple[int, bytes]:
    """Status, and what the device wrote before it."""
    submit(driver, kind, sector, out, into)
    [(_, written)] = wait_used(driver)
    status = driver.memory.read_u8(STATUS)
    assert written == (into + 1 if status == blk.S_OK and into else 1) or kind == blk.T_GET_ID
    return status, driver.memory.read(DATA, into)


def test_reads_and_writes(make: Callable[..., Driver], path: Path) -> None:
    driver = make(path)
    chance = random.Random(2)
    model = bytearray(path.read_bytes())
    for _ in range(200):
        sectors = chance.randint(1, 64)
        sector = chance.randint(0, SIZE // 512 - sectors)
        at = sector * 512
        if chance.random() < 0.5:
            data = chance.randbytes(sectors * 512)
            assert request(driver, blk.T_OUT, sector, out=data)[0] == blk.S_OK
            model[at : at + len(data)] = data
        else:
            want = bytes(model[at : at + sectors * 512])
            assert request(driver, blk.T_IN, sector, into=len(want)) == (blk.S_OK, want)
    assert request(driver, blk.T_FLUSH)[0] == blk.S_OK
    assert path.read_bytes() == model


@pytest.mark.parametrize("cache", ["writeback", "none", "unsafe"])
def test_caches(make: Callable[..., Driver], path: Path, cache: str) -> None:
    driver = make(path, cache=cache)
    data = os.urandom(8192)
    assert request(driver, blk.T_OUT, 8, out=data)[0] == blk.S_OK
    assert request(driver, blk.T_FLUSH)[0] == blk.S_OK
    assert request(driver, blk.T_IN, 8, into=8192) == (blk.S_OK, data)


def test_o_direct_with_buffers_at_odd_addresses(make: Callable[..., Driver], path: Path) -> None:
    driver = make(path, cache="none")
    data = os.urandom(1024)
    driver.memory.write(HEADER, struct.pack("<IIQ", blk.T_OUT, 0, 3))
    driver.memory.write(DATA + 7, data)
    driver.rings[0].add([(HEADER, 16, False), (DATA + 7, 1024, False), (STATUS, 1, True)])
    driver.kick()
    wait_used(driver)
    assert driver.memory.read_u8(STATUS) == blk.S_OK
    driver.memory.write(HEADER, struct.pack("<IIQ", blk.T_IN, 0, 3))
    into = [(DATA + 0x2003, 100, True), (DATA + 0x3001, 924, True)]
    driver.rings[0].add([(HEADER, 16, False), *into, (STATUS, 1, True)])
    driver.kick()
    wait_used(driver)
    assert driver.memory.read_u8(STATUS) == blk.S_OK
    assert driver.memory.read(DATA + 0x2003, 100) + driver.memory.read(DATA + 0x3001, 924) == data


def cuts(chance: random.Random, size: int) -> list[int]:
    places = sorted({0, size, *(chance.randint(0, size) for _ in range(chance.randint(0, 4)))})
    return [b - a for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize("seed", range(20))
def test_any_framing(make: Callable[..., Driver], path: Path, seed: int) -> None:
    """2.7.4.1: no assumption about how a request is laid out in descriptors."""
    chance = random.Random(seed)
    driver = make(path)
    data = chance.randbytes(1024)
    whole = struct.pack("<IIQ", blk.T_OUT, 0, 5) + data
    driver.memory.write(DATA, whole)
    buffers, at = [], DATA
    for size in cuts(chance, len(whole)):
        buffers.append((at, size, False))
        at += size
    driver.rings[0].add([*buffers, (STATUS, 1, True)])
    driver.kick()
    wait_used(driver)
    assert driver.memory.read_u8(STATUS) == blk.S_OK
    driver.memory.write(DATA, struct.pack("<IIQ", blk.T_IN, 0, 5))
    buffers, at = [], DATA
    for writable, total in ((False, 16), (True, 1025)):
        for size in cuts(chance, total):
            buffers.append((at, size, writable))
            at += size
    driver.rings[0].add(buffers)
    driver.kick()
    assert wait_used(driver)[0][1] == 1025
    assert driver.memory.read(DATA + 16, 1025) == data + bytes([blk.S_OK])


@pytest.mark.parametrize(
    ("kind", "sector", "size", "status"),
    [
        (blk.T_IN, SIZE // 512, 512, blk.S_IOERR),
        (blk.T_IN, SIZE // 512 - 1, 1024, blk.S_IOERR),
        (blk.T_IN, SIZE // 512 - 1, 512, blk.S_OK),
        (blk.T_IN, 0, 511, blk.S_IOERR),
        (blk.T_IN, 0, 0, blk.S_IOERR),
        (blk.T_IN, (1 << 64) - 1, 512, blk.S_IOERR),
        (blk.T_IN, 1 << 55, 512, blk.S_IOERR),
        (blk.T_OUT, SIZE // 512, 512, blk.S_IOERR),
        (blk.T_OUT, (1 << 64) - 1, 512, blk.S_IOERR),
        (blk.T_OUT, 0, 100, blk.S_IOERR),
        (blk.T_OUT, 0, 0, blk.S_IOERR),
        (99, 0, 0, blk.S_UNSUPP),
        (0xFFFFFFFF, 0, 512, blk.S_UNSUPP),
    ],
)
def test_bounds(
    make: Callable[..., Driver], path: Path, kind: int, sector: int, size: int, status: int
) -> None:
    before = path.read_bytes()
    driver = make(path)
    if kind == blk.T_OUT:
        assert request(driver, kind, sector, out=b"x" * size)[0] == status
    else:
        assert request(driver, kind, sector, into=size)[0] == status
    assert path.read_bytes() == before


def test_the_id(make: Callable[..., Driver], path: Path) -> None:
    driver = make(path)
    assert request(driver, blk.T_GET_ID, into=20) == (blk.S_OK, b"SN-1".ljust(20, b"\0"))
    assert request(driver, blk.T_GET_ID, into=3)[1] == b"SN-"


def test_a_read_only_disk(make: Callable[..., Driver], path: Path) -> None:
    before = path.read_bytes()
    driver = make(path, readonly=True)
    assert driver.features >> blk.F_RO & 1
    assert request(driver, blk.T_IN, into=512) == (blk.S_OK, before[:512])
    assert request(driver, blk.T_OUT, out=b"x" * 512)[0] == blk.S_IOERR
    assert request(driver, blk.T_DISCARD, out=struct.pack("<QII", 0, 8, 0))[0] == blk.S_UNSUPP
    assert path.read_bytes() == before


def test_discard_and_write_zeroes(make: Callable[..., Driver], path: Path) -> None:
    driver = make(path)
    before = path.read_bytes()
    blocks = path.stat().st_blocks
    ranges = struct.pack("<QII", 8, 64, 0) + struct.pack("<QII", 256, 64, 0)
    assert request(driver, blk.T_DISCARD, out=ranges)[0] == blk.S_OK
    assert path.stat().st_blocks <= blocks - 128
    assert request(driver, blk.T_WRITE_ZEROES, out=struct.pack("<QII", 801, 3, 0))[0] == blk.S_OK
    assert request(driver, blk.T_WRITE_ZEROES, out=struct.pack("<QII", 1024, 64, 1))[0] == blk.S_OK
    want = bytearray(before)
    for sector, count in ((8, 64), (256, 64), (801, 3), (1024, 64)):
        want[sector * 512 : (sector + count) * 512] = bytes(count * 512)
    assert path.read_bytes() == want


@pytest.mark.parametrize("kind", [blk.T_DISCARD, blk.T_WRITE_ZEROES])
@pytest.mark.parametrize(
    ("ranges", "status"),
    [
        (b"", blk.S_IOERR),
        (b"x" * 15, blk.S_IOERR),
        (struct.pack("<QII", 0, 8, 0) * 65, blk.S_IOERR),
        (struct.pack("<QII", 0, 8, 2), blk.S_UNSUPP),
        (struct.pack("<QII", SIZE // 512, 8, 0), blk.S_IOERR),
        (struct.pack("<QII", (1 << 64) - 8, 8, 0), blk.S_IOERR),
        (struct.pack("<QII", 0, 0xFFFFFFFF, 0), blk.S_IOERR),
        (struct.pack("<QII", 0, 0, 0), blk.S_IOERR),
        (struct.pack("<QII", 0, 8, 0) + struct.pack("<QII", SIZE // 512, 8, 0), blk.S_IOERR),
    ],
)
def test_ranges_that_cannot_be(
    make: Callable[..., Driver], path: Path, kind: int, ranges: bytes, status: int
) -> None:
    before = path.read_bytes()
    assert request(make(path), kind, out=ranges)[0] == status
    assert path.read_bytes() == before


def test_the_configuration(make: Callable[..., Driver], path: Path) -> None:
    driver = make(path, queues=3)
    read = driver.read
    assert read(mmio.CONFIG) | read(mmio.CONFIG + 4) << 32 == SIZE // 512
    assert read(mmio.CONFIG + 12) == 254  # seg_max
    assert read(mmio.CONFIG + 20) == 512  # blk_size
    assert read(mmio.CONFIG + 24, 1) == 3  # physical_block_exp: 4 KiB
    assert read(mmio.CONFIG + 34, 2) == 3  # num_queues
    assert read(mmio.CONFIG + 36) > 0 and read(mmio.CONFIG + 40) > 0  # discard limits
    assert read(mmio.CONFIG + 60) == 0  # beyond its end


class Slow(RawImage):
    """An image whose flush (or reads from disk) wait for `go`, and which remembers its calls."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.go = threading.Event()
        self.calls: list[str] = []

    def flush(self) -> None:
        self.calls.append("flush")
        assert self.go.wait(20)
        super().flush()

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        self.calls.append("write")
        super().write(views, offset)


def test_a_flush_is_answered_when_it_is_done(make: Callable[..., Driver], path: Path) -> None:
    image = Slow(str(path))
    driver = make(path, image=image)
    submit(driver, blk.T_FLUSH)
    time.sleep(0.05)
    assert driver.rings[0].used() == []
    # Those behind it do not wait.
    memory = driver.memory
    memory.write(HEADER + 32, struct.pack("<IIQ", blk.T_IN, 0, 0))
    behind = driver.rings[0].add(
        [(HEADER + 32, 16, False), (DATA, 512, True), (STATUS + 1, 1, True)]
    )
    driver.kick()
    assert wait_used(driver) == [(behind, 513)]
    image.go.set()
    assert wait_used(driver)[0][1] == 1
    assert driver.take_interrupts() == 1


def test_without_write_back_a_write_is_on_disk_first(
    make: Callable[..., Driver], path: Path
) -> None:
    image = Slow(str(path))
    image.go.set()
    driver = make(path, image=image)
    driver.write(mmio.CONFIG + blk.WRITEBACK, 0, 1)
    assert driver.read(mmio.CONFIG + blk.WRITEBACK, 1) == 0
    assert request(driver, blk.T_OUT, out=b"x" * 512)[0] == blk.S_OK
    assert image.calls == ["write", "flush"]
    zeroes = struct.pack("<QII", 0, 8, 0)
    assert request(driver, blk.T_WRITE_ZEROES, out=zeroes)[0] == blk.S_OK
    assert image.calls == ["write", "flush", "flush"]
    assert request(driver, blk.T_DISCARD, out=zeroes)[0] == blk.S_OK
    image.calls.pop()
    driver.write(mmio.CONFIG + blk.WRITEBACK, 1, 1)
    assert request(driver, blk.T_OUT, out=b"x" * 512)[0] == blk.S_OK
    assert image.calls == ["write", "flush", "write"]


def test_a_driver_that_knows_no_flush_gets_write_through(path: Path) -> None:
    image = Slow(str(path))
    image.go.set()
    with Driver(Block(image), without=1 << blk.F_FLUSH) as driver:
        assert driver.read(mmio.CONFIG + blk.WRITEBACK, 1) == 0
        assert request(driver, blk.T_OUT, out=b"x" * 512)[0] == blk.S_OK
        assert image.calls == ["write", "flush"]


def test_a_reset_waits_for_what_is_under_way(make: Callable[..., Driver], path: Path) -> None:
    image = Slow(str(path))
    driver = make(path, image=image)
    submit(driver, blk.T_FLUSH)
    reset = threading.Thread(target=driver.start)
    reset.start()
    time.sleep(0.05)
    assert reset.is_alive()
    image.go.set()
    reset.join(20)
    assert not reset.is_alive()
    assert driver.rings[0].used() == []  # nothing of the former life
    assert request(driver, blk.T_IN, into=512)[0] == blk.S_OK


def test_an_image_cut_short_is_an_error_and_no_signal(
    make: Callable[..., Driver], path: Path
) -> None:
    driver = make(path)
    told: list[str] = []
    driver.device.on_error = told.append
    os.truncate(path, 4096)
    assert request(driver, blk.T_IN, 8, into=512)[0] == blk.S_IOERR
    assert request(driver, blk.T_IN, 7, into=512)[0] == blk.S_OK
    assert told == [f"blk: {path}: read at byte 4096: short transfer"]
    for _ in range(20):
        assert request(driver, blk.T_IN, 8, into=512)[0] == blk.S_IOERR
    assert len(told) == 10
    assert told[-1].endswith("short transfer (no more is said of this device)")


def test_a_full_file_system_is_an_error(
    make: Callable[..., Driver], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RLIMIT_FSIZE stands in for it: EFBIG comes back from the kernel the same way."""
    import resource
    import signal

    driver = make(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        assert request(driver, blk.T_OUT, 64, out=b"x" * 512)[0] == blk.S_IOERR
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert request(driver, blk.T_OUT, 64, out=b"x" * 512)[0] == blk.S_OK


class Full(RawImage):
    """A file system without space, until there is."""

    full = True

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(views, offset)


@pytest.fixture(params=["writeback", "none"])
def full(path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Driver, Full, list[str]]]:
    image, stops = Full(str(path), cache=request.param), []
    with Driver(Block(image, queues=2, stop_when_full=True, name="blk0")) as driver:
        driver.device.on_stop = stops.append
        yield driver, image, stops


def wait_for(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_no_space_left_stops_the_machine(full: tuple[Driver, Full, list[str]]) -> None:
    driver, image, stops = full
    submit(driver, blk.T_OUT, 9, out=b"x" * 512)
    wait_for(lambda: stops)
    assert stops == [f"blk0: {image.path}: write: No space left on device"]
    assert driver.rings[0].used() == []
    with pytest.raises(StateError, match="blk0: 1 writes wait for space"):
        driver.device.save()
    driver.device.resumed()  # too early: there is none yet
    wait_for(lambda: len(stops) == 2)
    image.full = False
    driver.device.resumed()
    assert wait_used(driver)[0][1] == 1
    assert driver.memory.read_u8(STATUS) == blk.S_OK
    assert request(driver, blk.T_IN, 9, into=512) == (blk.S_OK, b"x" * 512)
    driver.device.save()
    driver.device.resumed()


@pytest.mark.parametrize("index", [0, 1])
def test_a_reset_forgets_what_waits_for_space(
    full: tuple[Driver, Full, list[str]], index: int
) -> None:
    """That of the device, and that of its queue, but not of another queue."""
    driver, image, stops = full
    for _ in range(2):
        submit(driver, blk.T_OUT, 9, out=b"x" * 512, index=1)
        wait_for(lambda: stops)
        stops.clear()
        driver.write(mmio.QUEUE_SEL, index)
        driver.write(mmio.QUEUE_RESET, 1)
        driver.device.resumed()
        if index == 0:
            wait_for(lambda: stops)
        driver.device.drain()
        assert bool(stops) is (index == 0)
        stops.clear()
        driver.start()
        driver.device.resumed()
        driver.device.drain()
        assert stops == []
    image.full = False
    assert request(driver, blk.T_IN, 9, into=512)[1] != b"x" * 512


def test_other_errors_are_the_guests(path: Path) -> None:
    image = Full(str(path))
    with Driver(Block(image)) as driver:
        assert request(driver, blk.T_OUT, 9, out=b"x" * 512)[0] == blk.S_IOERR


def test_more_than_2_tib(make: Callable[..., Driver], tmp_path: Path) -> None:
    path = tmp_path / "big.img"
    path.touch()
    os.truncate(path, 3 << 40)
    driver = make(path)
    last = (3 << 40) // 512 - 1
    data = os.urandom(512)
    assert request(driver, blk.T_OUT, last, out=data)[0] == blk.S_OK
    assert request(driver, blk.T_IN, last, into=512) == (blk.S_OK, data)
    assert request(driver, blk.T_IN, last + 1, into=512)[0] == blk.S_IOERR


@pytest.mark.parametrize("kind", [blk.T_IN, blk.T_OUT, blk.T_DISCARD, blk.T_WRITE_ZEROES])
def test_all_of_memory_many_times_over(
    make: Callable[..., Driver], tmp_path: Path, kind: int
) -> None:
    """1,000 buffers of 4 MiB in one request: not to be read, written or copied."""
    path = tmp_path / "big.img"
    path.touch()
    os.truncate(path, 3 << 40)
    driver = make(path)
    driver.memory.write(HEADER, struct.pack("<IIQ", kind, 0, 0))
    data = [(0x300000, 4 << 20, kind == blk.T_IN)] * 1000
    table = DATA + 0x10000
    driver.rings[0].add([(HEADER, 16, False), *data, (STATUS, 1, True)], indirect=table)
    begin = time.process_time()
    driver.kick()
    wait_used(driver)
    assert driver.memory.read_u8(STATUS) == blk.S_IOERR
    assert time.process_time() - begin < 1
    assert path.stat().st_blocks == 0


def test_kept_requests_are_bounded_by_what_they_cost(
    make: Callable[..., Driver], path: Path
) -> None:
    """Flushes that name a thousand buffers each, while the disk is slow."""

    class Slow(RawImage):
        def flush(self) -> None:
            go_on.wait(20)

    go_on = threading.Event()
    driver = make(path, queues=2, image=Slow(str(path)), size=256)
    disk = driver.device
    assert isinstance(disk, Block)
    buffers = [(HEADER, 16, False), *[(DATA, 1, True)] * 1000, (DATA, 24, True), (STATUS, 1, True)]
    driver.memory.write(HEADER, struct.pack("<IIQ", blk.T_FLUSH, 0, 0))
    for index in range(2):
        for _ in range(256):
            driver.rings[index].add(buffers, indirect=0x300000)
        driver.kick(index)
    kept = disk._pending
    assert kept > blk.WORKERS  # they have enough to do
    assert kept * len(buffers) * blk.BUFFER_COST <= blk.BACKLOG + len(buffers) * blk.BUFFER_COST
    go_on.set()
    for index in range(2):
        wait_used(driver, index, 256)


def test_queues_are_served_at_the_same_time(make: Callable[..., Driver], path: Path) -> None:
    driver = make(path, queues=4)
    memory, failed = driver.memory, []

    def load(index: int) -> None:
        base = BUFFERS + 0x10000 * (index + 1)
        chance = random.Random(index)
        for _ in range(200):
            sector = index * 256 + chance.randint(0, 255)
            data = chance.randbytes(512)
            for kind, write in ((blk.T_OUT, False), (blk.T_IN, True)):
                memory.write(base, struct.pack("<IIQ", kind, 0, sector))
                if not write:
                    memory.write(base + 0x1000, data)
                driver.rings[index].add(
                    [(base, 16, False), (base + 0x1000, 512, write), (base + 64, 1, True)]
                )
                driver.device.notify(index)
                wait_used(driver, index)
                if memory.read_u8(base + 64) or memory.read(base + 0x1000, 512) != data:
                    failed.append((index, sector))

    threads = [threading.Thread(target=load, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


@pytest.mark.parametrize(
    "buffers",
    [
        [(HEADER, 16, False)],
        [(HEADER, 8, False), (STATUS, 1, True)],
        [(HEADER, 15, False), (STATUS, 1, True)],
        [(STATUS, 1, True)],
    ],
    ids=["no status", "half a header", "a header less a byte", "no header"],
)
def test_a_request_that_is_none_needs_a_reset(
    make: Callable[..., Driver], path: Path, buffers: list[tuple[int, int, bool]]
) -> None:
    driver = make(path)
    errors: list[str] = []
    driver.device.on_error = errors.append
    driver.rings[0].add(buffers)
    driver.kick()
    assert driver.read(mmio.STATUS) & spec.DEVICE_NEEDS_RESET
    assert driver.take_interrupts() == 2
    assert len(errors) == 1 and "the driver must reset" in errors[0]
    driver.start()
    assert request(driver, blk.T_IN, into=512)[0] == blk.S_OK


def test_it_goes_on_where_it_was_saved(make: Callable[..., Driver], path: Path) -> None:
    driver = make(path)
    driver.write(mmio.CONFIG + blk.WRITEBACK, 0, 1)
    for _ in range(20):
        request(driver, blk.T_IN, into=512)
    state = driver.transport.save()
    driver.device.close()
    again = Block(RawImage(str(path)))
    again.memory = driver.memory
    again.interrupt = driver.device.interrupt
    driver.device = driver.transport.device = again
    driver.transport.restore(state)
    driver.transport.resume()
    assert driver.read(mmio.CONFIG + blk.WRITEBACK, 1) == 0
    assert request(driver, blk.T_IN, into=512) == (blk.S_OK, path.read_bytes()[:512])

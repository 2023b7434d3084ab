"""Drivers that break every rule: no exception, no access outside memory, usable after a reset.

The cases come from numbers: a failure says which one, and `VMM_HOSTILE=SEED:CASE` runs that alone
(`VMM_HOSTILE=SEED` runs all of another seed). A new device is a row in DEVICES; a new transport
one in TRANSPORTS.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import struct
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.virtio_driver import BUFFERS, Driver, ServedDriver
from tests.support.virtio_hostile import BUFFER, MmioRegisters, Registers, Rig
from tests.support.virtio_hostile import BUFFERS as RIG_BUFFERS
from tests.support.virtio_pci import PciRegisters
from vmm.block.raw import RawImage
from vmm.memory import GuestMemory
from vmm.net.port import Backend, Port, scatter
from vmm.virtio import blk, kernel, mmio, net_spec, spec, vsock_packet
from vmm.virtio.balloon import Balloon
from vmm.virtio.blk import Block
from vmm.virtio.console import CONTROL, DEVICE_READY, PORT_READY, VirtioConsole
from vmm.virtio.console_ports import PORT_OPEN, ConsolePort, FilePort
from vmm.virtio.device import VirtioDevice
from vmm.virtio.net import Nic
from vmm.virtio.packed import PackedQueue
from vmm.virtio.queue import Chain, VirtQueue
from vmm.virtio.rng import Entropy
from vmm.virtio.split import SplitQueue
from vmm.virtio.vsock import Vsock
from vmm.virtio.vsock_host import VsockHost

CASES = {"mmio": 6000, "pci": 3000}
"""For each device, ring and mode: some 250,000 in all. What differs over PCI is registers."""
BATCH = 50
SECTORS = 64
CID = 42
MAC = b"\x52\x54\0\0\0\5"
SEED, _, ONLY = os.environ.get("VMM_HOSTILE", "1").partition(":")


class Echo(VirtioDevice):
    """Answers with what it read, over several queues."""

    ID = 63
    QUEUES = (256, 64)

    def __init__(self) -> None:
        super().__init__("echo")
        self.config[:] = bytes(16)

    def request(self, index: int, chain: Chain) -> int | None:
        data = b""
        for view in chain.readable:
            data += view[: 4096 - len(data)]
        return chain.write(data)

    def config_written(self, offset: int, data: bytes) -> None:
        self.config[offset : offset + len(data)] = data
        self.config_changed()


def no_fill(memory: GuestMemory, chance: random.Random) -> None:
    memory.write(RIG_BUFFERS, chance.randbytes(64))


def fill_blk(memory: GuestMemory, chance: random.Random) -> None:
    """A request's header, and what discard's ranges may look like."""
    kind = chance.choice((0, 0, 0, 1, 1, 1, 4, 8, 11, 11, 13, 13, 5, 0xFFFFFFFF))
    sector = chance.choice((0, 0, 1, 7, SECTORS - 1, SECTORS, 1 << 55, (1 << 64) - 1))
    memory.write(RIG_BUFFERS, struct.pack("<IIQ", kind, 0, sector))
    ranges = b"".join(
        struct.pack(
            "<QII",
            sector,
            chance.choice((0, 1, 8, SECTORS, 1 << 22, 0xFFFFFFFF)),
            chance.choice((0, 0, 0, 1, 2, 0xFFFFFFFF)),
        )
        for _ in range(4)
    )
    memory.write(RIG_BUFFERS + 16, ranges)
    memory.write(RIG_BUFFERS + BUFFER * chance.randrange(1, 16), ranges)


def make_blk(tmp_path: Path) -> Block:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SECTORS * 512))
    return Block(RawImage(str(path), cache="unsafe"), queues=2)


def good_blk(driver: Driver) -> None:
    memory, data = driver.memory, os.urandom(512)
    for kind, write in ((blk.T_OUT, False), (blk.T_IN, True)):
        memory.write(BUFFERS, struct.pack("<IIQ", kind, 0, 3))
        memory.write(BUFFERS + 0x1000, bytes(512) if write else data)
        memory.write_u8(BUFFERS + 64, 0xAA)
        exchange(driver, [(BUFFERS, 16, False), (BUFFERS + 0x1000, 512, write),
                          (BUFFERS + 64, 1, True)])  # fmt: skip
        assert memory.read_u8(BUFFERS + 64) == blk.S_OK
        assert memory.read(BUFFERS + 0x1000, 512) == data


def good_rng(driver: Driver) -> None:
    driver.memory.fill(BUFFERS, 64)
    exchange(driver, [(BUFFERS, 64, True)])
    assert any(driver.memory.read(BUFFERS, 64))


def good_echo(driver: Driver) -> None:
    driver.memory.write(BUFFERS, b"hello")
    exchange(driver, [(BUFFERS, 5, False), (BUFFERS + 64, 5, True)])
    assert driver.memory.read(BUFFERS + 64, 5) == b"hello"


def fill_vsock(memory: GuestMemory, chance: random.Random) -> None:
    """Packets of the few connections there can be, mostly."""
    for number in range(16):
        memory.write(RIG_BUFFERS + BUFFER * number, vsock_packet.HEADER.pack(
            chance.choice((CID, CID, CID, 2)), chance.choice((2, 2, 2, CID)),
            chance.randint(1, 3), chance.randint(1, 3),
            chance.choice((0, 0, 1, 20, 1 << 20, 0xFFFFFFFF)), chance.choice((1, 1, 1, 2)),
            chance.randint(0, 8), chance.randint(0, 3), chance.getrandbits(32),
            chance.getrandbits(32)))  # fmt: skip


def make_vsock(tmp_path: Path) -> Vsock:
    place = tempfile.mkdtemp(dir=tmp_path.parents[1])  # a short name: sun_path is
    return Vsock(CID, VsockHost(f"{place}/v"))


def ask_vsock(rig: Rig) -> None:
    """A wish that is refused, and room for the answer."""
    rig.prepare(0, room=4096)
    packet = vsock_packet.HEADER.pack(CID, 2, 9, 1, 0, 1, vsock_packet.OP_REQUEST, 0, 4096, 0)
    rig.prepare(1, packet)


def good_vsock(driver: Driver) -> None:
    driver.rings[0].add([(BUFFERS + 0x1000, 4096, True)])
    driver.kick(0)
    packet = vsock_packet.HEADER.pack(CID, 2, 5, 6, 0, 1, vsock_packet.OP_RW, 0, 0, 0)
    driver.memory.write(BUFFERS, packet)
    driver.rings[1].add([(BUFFERS, len(packet), False)])
    driver.kick(1)
    assert len(used(driver, 1)) == 1
    assert [written for _, written in used(driver, 0)] == [len(packet)]
    answer = vsock_packet.HEADER.unpack(driver.memory.read(BUFFERS + 0x1000, len(packet)))
    assert answer[:4] == (2, CID, 6, 5)
    assert answer[6] == vsock_packet.OP_RST


def fill_console(memory: GuestMemory, chance: random.Random) -> None:
    for number in range(16):
        message = CONTROL.pack(
            chance.choice((0, 1, 2, 3, 1 << 31)), chance.randint(0, 8), chance.randint(0, 1)
        )
        memory.write(RIG_BUFFERS + BUFFER * number, message)


class Typed(ConsolePort):
    """A console at which somebody has typed, whenever it begins."""

    def forget(self) -> None:
        super().forget()
        self._input += b"typed before " * 50


class Heard(FilePort):
    """A port with input."""

    def forget(self) -> None:
        super().forget()
        self._input += b"heard before " * 50


def make_console(tmp_path: Path) -> VirtioConsole:
    ports = [Heard(number, f"p{number}", "/dev/null") for number in (1, 2, 3)]
    return VirtioConsole([Typed(lambda data: None), *ports])


def open_console(rig: Rig) -> None:
    """The driver's first messages, and buffers for all there is."""
    for queue in (0, 2, 2, 4, 6, 8):
        rig.prepare(queue, room=64)
    rig.prepare(3, CONTROL.pack(0, DEVICE_READY, 1))
    for port in range(4):
        rig.prepare(3, CONTROL.pack(port, PORT_READY, 1))
        rig.prepare(3, CONTROL.pack(port, PORT_OPEN, 1))


def good_console(driver: Driver) -> None:
    driver.memory.write(BUFFERS, b"hello")
    driver.rings[5].add([(BUFFERS, 5, False)])
    driver.kick(5)
    assert len(used(driver, 5)) == 1


def fill_balloon(memory: GuestMemory, chance: random.Random) -> None:
    """Page numbers in and beyond memory; statistics."""
    pages = [chance.choice((0x780, 0x781, 0x7FF, 0x800, 0xFFFFFFFF)) for _ in range(64)]
    memory.write(RIG_BUFFERS, struct.pack("<64I", *pages))
    memory.write(RIG_BUFFERS + BUFFER, chance.randbytes(64))


def good_balloon(driver: Driver) -> None:
    driver.memory.write(BUFFERS, struct.pack("<2I", 0x7FF, 0xFFFFFFFF))
    driver.memory.write_u32(0x7FF << 12, 1)
    exchange(driver, [(BUFFERS, 8, False)])
    assert driver.memory.read_u32(0x7FF << 12) == 0


class LoopPort(Port):
    """What is sent comes back."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.frames: deque[bytes] = deque(maxlen=64)

    def read(self, views: list[memoryview]) -> int:
        if not self.frames:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.fd)
            if not self.frames:
                return 0
        frame = self.frames.popleft()
        scatter(views, memoryview(frame))
        return len(frame)

    def write(self, views: Sequence[memoryview]) -> bool:
        frame = b"".join(views)
        if len(frame) <= 1526:  # one buffer of a good driver's
            self.frames.append(frame)
            os.eventfd_write(self.fd, 1)
        return True


class PlainPort(Port):
    """The same for the C kernel: a datagram socket connected to itself. Where it is full the oldest
    frames are lost, and those longer than a good driver's buffer always."""

    plain = True

    def __init__(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is: 4.5 KiB
            sock.bind("")
            sock.connect(sock.getsockname())
            self.fd = sock.detach()

    def read(self, views: list[memoryview]) -> int:
        try:
            return os.readv(self.fd, views)
        except OSError:
            return 0

    def write(self, views: Sequence[memoryview]) -> bool:
        while True:
            try:
                os.writev(self.fd, views)
            except BlockingIOError:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.fd, 1)
                continue
            except OSError:
                pass
            return True


class LoopBackend(Backend):
    features = net_spec.GUEST_OFFLOADS | spec.bits(net_spec.F_CTRL_GUEST_OFFLOADS)

    def __init__(self) -> None:
        super().__init__()
        make = PlainPort if kernel.library() else LoopPort
        self.ports += [make(), make()]

    def close(self) -> None:
        for port in self.ports:
            fd, port.fd = port.fd, -1
            if fd >= 0:
                os.close(fd)


def fill_net(memory: GuestMemory, chance: random.Random) -> None:
    """Commands, which are frames too; and tables of addresses."""
    for number in range(16):
        head = bytes((chance.randint(0, 6), chance.choice((0, 0, 0, 1, 1, 2, 3, 5, 6))))
        data = chance.choice((bytes(1), b"\1", b"\1\0", b"\2\0", bytes(6), bytes(8), MAC,
                              b"\1\0\0\0" + MAC + bytes(4), b"\xff" * 40))  # fmt: skip
        memory.write(RIG_BUFFERS + BUFFER * number, head + data)


def open_net(rig: Rig) -> None:
    """Both queue pairs, frames that come back, and room for them."""
    rig.prepare(4, b"\4\0\2\0", room=1)
    for queue in (0, 2):
        rig.prepare(queue, room=2048)
        rig.prepare(queue + 1, bytes(12) + MAC + bytes(60))
        rig.registers.notify(queue)


def good_net(driver: Driver) -> None:
    frame = MAC + os.urandom(60)
    driver.rings[0].add([(BUFFERS + 0x1000, 8192, True)])
    driver.kick(0)
    driver.memory.write(BUFFERS, bytes(12) + frame)
    driver.rings[1].add([(BUFFERS, 12 + len(frame), False)])
    driver.kick(1)
    assert len(used(driver, 1)) == 1
    while True:
        [(_, written)] = used(driver, 0)
        if driver.memory.read(BUFFERS + 0x100C, len(frame)) == frame:
            break
        driver.rings[0].add([(BUFFERS + 0x1000, 8192, True)])  # it was one from before
        driver.kick(0)
    assert written == 12 + len(frame)


class Row(NamedTuple):
    """make: the device, in a directory of its own; fill: what its requests look like; good: one
    that has to work; prelude: right requests before the wrong ones."""

    make: Callable[[Path], VirtioDevice]
    fill: Callable[[GuestMemory, random.Random], None]
    good: Callable[[Driver], None]
    prelude: Callable[[Rig], None] | None = None


DEVICES = {
    "blk": Row(make_blk, fill_blk, good_blk),
    "rng": Row(lambda _: Entropy(), no_fill, good_rng),
    "echo": Row(lambda _: Echo(), no_fill, good_echo),
    "vsock": Row(make_vsock, fill_vsock, good_vsock, ask_vsock),
    "console": Row(make_console, fill_console, good_console, open_console),
    "balloon": Row(lambda _: Balloon(), fill_balloon, good_balloon),
    "net": Row(lambda _: Nic(LoopBackend(), mac=MAC), fill_net, good_net, open_net),
}
TRANSPORTS: dict[str, Callable[[VirtioDevice], Registers]] = {
    "mmio": MmioRegisters,
    "pci": PciRegisters,
}


def exchange(driver: Driver, buffers: list[tuple[int, int, bool]]) -> None:
    """One request to queue 0, and its answer, which workers may give."""
    want = driver.rings[0].add(buffers)
    driver.kick()
    assert [ident for ident, _ in used(driver, 0)] == [want]


def used(driver: Driver, queue: int) -> list[tuple[int, int]]:
    """What comes back, which another thread may give."""
    limit = time.monotonic() + 20
    done: list[tuple[int, int]] = []
    while not done:
        assert time.monotonic() < limit, "no answer"
        done = driver.rings[queue].used()
    return done


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[False, True], ids=["flags", "event"])
def event_idx(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", DEVICES)
def test_hostile_cases(
    name: str,
    transport: str,
    packed: bool,
    event_idx: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Split rings with events by the C kernel, where it knows the device; without, in Python."""
    row = DEVICES[name]
    if not event_idx:
        monkeypatch.setattr(kernel, "_loaded", [None])
    rig = Rig(row.make(tmp_path), TRANSPORTS[transport], packed=packed, event_idx=event_idx,
              fill=row.fill, prelude=row.prelude)  # fmt: skip
    try:
        for number in [int(ONLY)] if ONLY else range(CASES[transport]):
            try:
                rig.case(random.Random(int(SEED) << 32 | number))
            except Exception as err:
                pytest.fail(f"{name}: VMM_HOSTILE={SEED}:{number}: {type(err).__name__}: {err}")
            if number % BATCH == BATCH - 1:
                row.good(rig.registers.driver(rig))
        row.good(rig.registers.driver(rig))
    finally:
        rig.close()


COMMON = {
    "a block request shorter than its header",
    "a block request without room for its status",
    "a readable descriptor follows a writable one",
    "an indirect descriptor with NEXT",
    "an indirect descriptor within an indirect table",
    "an indirect table at N, outside guest memory",
    "an indirect table of N bytes",
    "an indirect table of more than N entries",
    "descriptor N is outside guest memory",
    "descriptor at N has length N",
    "device area at N is not aligned to N bytes",
    "device area at N is outside guest memory",
    "driver area at N is not aligned to N bytes",
    "driver area at N is outside guest memory",
    "N entries, not N to N",
}
SPLIT = {
    "N chains made available, in a queue of N",
    "a descriptor chain that loops or is too long",
    "a split queue of N entries (not a power of two)",
    "descriptor index N in a table of N",
    "descriptor table at N is not aligned to N bytes",
    "descriptor table at N is outside guest memory",
}
PACKED = {
    "an indirect descriptor within a chain",
    "descriptor ring at N is not aligned to N bytes",
    "descriptor ring at N is outside guest memory",
    "more descriptors made available than the ring has",
}


def test_the_cases_break_every_rule(packed: bool, tmp_path: Path) -> None:
    """Each check of the queues is met, and good requests are among them: the generator is as
    hostile as the cases say it is."""
    device, seen, answers = make_blk(tmp_path), set(), set()
    rig = Rig(device, MmioRegisters, packed=packed, event_idx=True, fill=fill_blk)

    def broken(line: str) -> None:
        why = line.split(": ", 2)[2].removesuffix("; the driver must reset the device")
        seen.add(re.sub(r"0x[0-9a-f]+(\+0x[0-9a-f]+)?|\b\d+", "N", why))

    device.on_error, device.complaints = broken, 1 << 30
    request = device.request

    def watch(index: int, chain: Chain) -> int | None:
        written = request(index, chain)
        answers.add("later" if written is None else chain.writable[-1][-1])
        return written

    device.request = watch  # type: ignore[method-assign]
    try:
        for number in range(3000):
            rig.case(random.Random(number))
    finally:
        rig.close()
    assert seen == COMMON | (PACKED if packed else SPLIT)
    assert answers == {blk.S_OK, blk.S_IOERR, blk.S_UNSUPP, "later"}


@pytest.mark.parametrize("name", DEVICES)
def test_the_cases_meet_every_queue(
    name: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, met = DEVICES[name], set()
    rig = Rig(row.make(tmp_path), MmioRegisters, packed=packed, event_idx=True, fill=row.fill,
              prelude=row.prelude)  # fmt: skip
    kind = PackedQueue if packed else SplitQueue
    pop = kind.pop_batch

    def watch(queue: VirtQueue, *args: int) -> list[Chain]:
        chains = pop(queue, *args)  # type: ignore[arg-type]
        if chains:
            met.update(i for i, slot in enumerate(rig.device.slots) if slot.queue is queue)
        return chains

    monkeypatch.setattr(kind, "pop_batch", watch)
    try:
        for number in range(400):
            rig.case(random.Random(number))
    finally:
        rig.close()
    unused = {2} if name == "vsock" else set()  # its events: there are none
    assert met == set(range(len(rig.device.slots))) - unused


def test_a_case_is_its_number(packed: bool, event_idx: bool) -> None:
    """Whatever went before, it does the same."""
    rig = Rig(Echo(), MmioRegisters, packed=packed, event_idx=event_idx, fill=no_fill)

    def result(number: int) -> tuple[bytes, int]:
        for place in range(0, 0x220000, 0x10000):
            rig.memory.fill(place, 0x10000)
        rig.case(random.Random(number))
        return rig.memory.read(0, 0x220000), rig.registers.status()

    try:
        first = [result(number) for number in range(30)]
        assert [result(number) for number in reversed(range(30))] == first[::-1]
        assert len({memory for memory, _ in first}) == 30
    finally:
        rig.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", DEVICES)
def test_rings_that_change_under_the_device(name: str, packed: bool, tmp_path: Path) -> None:
    """As a second vCPU can: the device reads a descriptor while it is written."""
    row = DEVICES[name]
    device = row.make(tmp_path)
    with ServedDriver(device, packed=packed, event_idx=True) as driver:
        memory, ended = driver.memory, threading.Event()

        def scribble(seed: int) -> None:
            chance = random.Random(seed)
            while not ended.is_set():
                for ring in driver.rings:
                    slot = ring.desc + 16 * chance.randrange(16)
                    addr = chance.choice((BUFFERS, BUFFERS, 0x10000, (8 << 20) - 8, 1 << 40))
                    flags = chance.choice((0, 1, 2, 3, 4, 6)) | chance.choice((0, 0x80, 0x8000))
                    row = (addr, chance.choice((1, 16, 512)), chance.randrange(17), flags)
                    if not packed:
                        row = (addr, row[1], flags & 7, chance.randrange(17))
                        memory.write_u16(ring.driver + 2, chance.getrandbits(4))
                    memory.write(slot, struct.pack("<QIHH", *row))

        writers = [threading.Thread(target=scribble, args=(seed,)) for seed in (1, 2)]
        for writer in writers:
            writer.start()
        try:
            for _ in range(60):
                driver.write(mmio.STATUS, 0)
                with contextlib.suppress(AssertionError):  # no ring, where they change too soon
                    driver.start()
                for index in range(len(driver.rings)):
                    driver.kick(index)
                time.sleep(0.001)
        finally:
            ended.set()
            for writer in writers:
                writer.join()
        driver.start()
        row.good(driver)
    assert driver.failures == []

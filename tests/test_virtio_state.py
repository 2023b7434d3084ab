"""State of virtio devices: each is saved mid-life, and a fresh one goes on with its guest."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.net_guest import MAC, NetGuest, random_frame
from tests.support.virtio_driver import BUFFERS, Driver
from tests.support.virtio_pci import PciDriver
from tests.test_virtio_console import Guest as ConsoleGuest
from tests.test_virtio_net import Wire
from vmm.block.raw import RawImage
from vmm.errors import StateError
from vmm.memory import GuestMemory
from vmm.virtio import balloon, blk, console, mmio, spec
from vmm.virtio import net_spec as n
from vmm.virtio.balloon import Balloon
from vmm.virtio.blk import Block
from vmm.virtio.console_ports import Port, SocketPort
from vmm.virtio.device import VirtioDevice
from vmm.virtio.fs import Share
from vmm.virtio.limit import Limit
from vmm.virtio.mmio import MmioTransport
from vmm.virtio.net import Nic
from vmm.virtio.queue import Chain
from vmm.virtio.rng import Entropy

MODES = [(False, False), (False, True), (True, False), (True, True)]
SIZE = 1 << 20


@pytest.fixture(params=MODES, ids=["split", "split-event", "packed", "packed-event"])
def modes(request: pytest.FixtureRequest) -> dict[str, bool]:
    packed, event_idx = request.param
    return {"packed": packed, "event_idx": event_idx}


def plain(value: object) -> bool:
    """Whether it can be stored by any means."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(each) for key, each in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or isinstance(value, int | str | bytes)


def move(driver: Driver, other: VirtioDevice) -> None:
    """Save the driver's device, and restore it into `other` in a copy of guest memory.

    Nothing is served until `driver.transport.resume()`.
    """
    driver.device.hold()
    state = driver.transport.save()
    assert plain(state)
    memory = GuestMemory(driver.memory.size)
    memory.write(0, driver.memory.read(0, memory.size))
    driver.device.release()
    other.memory = memory
    transport = MmioTransport(other)
    transport.restore(state)
    driver.transport.close()
    for slot in driver.device.slots:
        slot.clear()
    driver.transport, driver.device, driver.memory = transport, other, memory
    for ring in driver.rings:
        ring.memory = memory


def wait_used(driver: Driver, index: int, count: int) -> list[tuple[int, int]]:
    done: list[tuple[int, int]] = []
    limit = time.monotonic() + 30
    while len(done) < count:
        assert time.monotonic() < limit, f"{len(done)} of {count} came back"
        done += driver.rings[index].used()
        time.sleep(0.001)
    return done


# --- disks ----------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(2).randbytes(SIZE))
    return path


class Gate(RawImage):
    """Reads go to a worker, which waits to be let through."""

    def __init__(self, path: str) -> None:
        super().__init__(path, readonly=True)
        self.reached, self.open = threading.Event(), threading.Event()

    def read_cached(self, views: object, offset: int, size: int) -> bool:
        return False

    def read(self, views: object, offset: int) -> None:
        self.reached.set()
        assert self.open.wait(30)
        super().read(views, offset)  # type: ignore[arg-type]


def ask(driver: Driver, number: int, *, size: int = 512) -> None:
    """Make a read of sector `number` available, without a notify."""
    at = BUFFERS + number * 0x1000
    driver.memory.write(at, struct.pack("<IIQ", blk.T_IN, 0, number))
    driver.memory.write_u8(at + 0x800, 0xAA)
    driver.rings[0].add([(at, 16, False), (at + 0x100, size, True), (at + 0x800, 1, True)])


def got(driver: Driver, image: Path, number: int) -> bool:
    at = BUFFERS + number * 0x1000
    if driver.memory.read_u8(at + 0x800) != blk.S_OK:
        return False
    want = image.read_bytes()[512 * number : 512 * number + 512]
    return driver.memory.read(at + 0x100, 512) == want


def test_a_disk(image: Path, modes: dict[str, bool]) -> None:
    with Driver(Block(RawImage(str(image), readonly=True)), **modes) as driver:
        for number in range(30):  # past the end of the ring
            ask(driver, number)
            driver.kick()
            wait_used(driver, 0, 1)
        for number in range(5):
            ask(driver, 100 + number)  # available; the notify has not come
        move(driver, Block(RawImage(str(image), readonly=True)))
        assert driver.transport.save() == driver.transport.save()
        driver.kick()
        assert driver.rings[0].used() == []
        driver.transport.resume()
        wait_used(driver, 0, 5)
        assert all(got(driver, image, 100 + number) for number in range(5))
        for number in range(30):
            ask(driver, number)
            driver.kick()
            wait_used(driver, 0, 1)
            assert got(driver, image, number)


def test_a_save_waits_for_requests_under_way(image: Path, modes: dict[str, bool]) -> None:
    """They are in guest memory, and in the ring, before it returns; those after are not begun."""
    gate = Gate(str(image))
    with Driver(Block(gate), **modes) as driver:
        for number in range(4):
            ask(driver, number)
        driver.kick()
        assert gate.reached.wait(30)
        states: list[dict[str, object]] = []
        saving = threading.Thread(target=lambda: states.append(driver.transport.save()))
        saving.start()
        saving.join(0.05)
        assert saving.is_alive()
        gate.open.set()
        saving.join(30)
        assert len(states) == 1
        assert len(driver.rings[0].used()) == 4
        assert all(got(driver, image, number) for number in range(4))
        ask(driver, 4)  # the device goes on
        driver.kick()
        wait_used(driver, 0, 1)
        assert got(driver, image, 4)


def test_nothing_is_served_while_it_is_held(image: Path, modes: dict[str, bool]) -> None:
    with Driver(Block(RawImage(str(image), readonly=True)), **modes) as driver:
        driver.device.hold()
        ask(driver, 1)
        serving = threading.Thread(target=driver.kick)
        serving.start()
        state = driver.transport.save()
        assert driver.transport.save() == state
        serving.join(0.05)
        assert driver.rings[0].used() == []
        driver.device.release()
        serving.join(30)
        wait_used(driver, 0, 1)
        assert got(driver, image, 1)


def test_a_disk_of_another_size(image: Path, tmp_path: Path) -> None:
    (tmp_path / "other.img").write_bytes(bytes(512))
    with Driver(Block(RawImage(str(image), readonly=True))) as driver:
        state = driver.device.save()
    other = Block(RawImage(str(tmp_path / "other.img"), readonly=True))
    with pytest.raises(ValueError, match="state of blk: its disk did not have 1 sectors"):
        other.restore(state)
    other.close()


def test_features_that_are_not_to_be_had(image: Path) -> None:
    """A guest that writes, on an image that cannot be written."""
    with Driver(Block(RawImage(str(image)))) as driver:
        state = driver.device.save()
    other = Block(RawImage(str(image), readonly=True))
    with pytest.raises(ValueError, match="state of blk: its driver has features 0x6000, which"):
        other.restore(state)
    other.close()


# --- network cards --------------------------------------------------------------------------------


def test_a_network_card(modes: dict[str, bool]) -> None:
    wire, new = Wire(), Wire()
    guest = NetGuest(Nic(wire.backend, mac=MAC), **modes)
    with guest:
        for _ in range(100):
            frame = random_frame(100)
            guest.send(frame)
            assert wire.receive() == frame
            wire.send(frame)
            assert guest.frame() == frame
        assert guest.command(0, 0, b"\0") == n.CTRL_OK
        frame = random_frame(60)
        guest.memory.write(0x600000, bytes(n.HEADER_SIZE) + frame)
        guest.rings[1].add([(0x600000, n.HEADER_SIZE + len(frame), False)])
        new.send(frame)
        nic = guest.nic = Nic(new.backend, mac=bytes(6))
        move(guest, nic)
        guest.kick(0)
        assert guest.silent(0.05)
        guest.transport.resume()
        assert new.receive() == frame
        assert guest.frame() == frame
        assert guest.config_status() == n.S_LINK_UP | n.S_ANNOUNCE
        assert bytes(nic.config[:6]) == MAC
        assert not nic.filter.promiscuous
        for _ in range(100):
            guest.send(frame)
            assert new.receive() == frame
            new.send(frame)
            assert guest.frame() == frame
    for each in (wire, new):
        each.sock.close()


# --- others ---------------------------------------------------------------------------------------


def test_entropy_that_waits(modes: dict[str, bool]) -> None:
    with Driver(Entropy(limit=Limit(bytes=1, burst_bytes=1)), **modes) as driver:
        for number in range(6):
            driver.rings[0].add([(BUFFERS + 64 * number, 64, True)])
        driver.kick()
        before = len(driver.rings[0].used())
        move(driver, Entropy())
        driver.transport.resume()
        assert before + len(driver.rings[0].used()) == 6


def test_a_balloon(modes: dict[str, bool]) -> None:
    with Driver(Balloon(size=2 << 20), **modes) as driver:
        driver.write(mmio.CONFIG + balloon.ACTUAL, 512)
        driver.memory.write(BUFFERS, struct.pack("<HQ", 4, 12345))
        driver.rings[2].add([(BUFFERS, 10, False)])
        driver.kick(2)
        assert driver.rings[2].used() == []  # kept
        driver.memory.write(0x400000, b"x" * 4096)
        driver.memory.write(BUFFERS + 64, struct.pack("<I", 0x400))
        driver.rings[0].add([(BUFFERS + 64, 4, False)])
        other = Balloon()
        move(driver, other)
        assert (other.wanted, other.actual) == (2 << 20, 2 << 20)
        assert driver.memory.read(0x400000, 1) == b"x"
        driver.transport.resume()
        assert len(driver.rings[0].used()) == 1
        assert driver.memory.read(0x400000, 1) == b"\0"
        assert driver.rings[2].used() == []
        asking = threading.Thread(target=lambda: other.stats(30))
        asking.start()
        wait_used(driver, 2, 1)  # the old one's buffer, for new statistics
        driver.rings[2].add([(BUFFERS, 10, False)])
        driver.kick(2)
        asking.join(30)
        assert not asking.is_alive()


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[Callable[[str], list[Port | None]]]:
    made: list[Port] = []

    def make(name: str) -> list[Port | None]:
        made.append(SocketPort(1, "agent", str(tmp_path / name)))
        return [None, made[-1]]

    yield make
    for port in made:
        port.close()


def test_a_console(
    ports: Callable[[str], list[Port | None]], tmp_path: Path, modes: dict[str, bool]
) -> None:
    """Input the guest has not read and messages it has not got are kept; who was connected is
    not any more, which it is told."""
    with ConsoleGuest(ports("old"), **modes) as guest, socket.socket(socket.AF_UNIX) as program:
        guest.control(0, console.DEVICE_READY)
        assert guest.told()[:3] == (1, console.DEVICE_ADD, 1)
        guest.control(1, console.PORT_READY)
        assert guest.told()[1] == console.PORT_NAME
        program.connect(str(tmp_path / "old"))
        assert guest.told()[:3] == (1, console.PORT_OPEN, 1)
        program.send(b"typed")
        port = guest.device.ports[1]
        assert port is not None
        limit = time.monotonic() + 30
        while port.backlog < 5:
            assert time.monotonic() < limit
            time.sleep(0.001)
        guest.control(1, console.PORT_READY)  # its messages wait for buffers
        guest.put(5, b"said")
        wait_used(guest.driver, 5, 1)
        assert program.recv(100) == b"said"
        driver = guest.driver
        other = console.VirtioConsole(ports("new"))
        state = driver.device.save()
        assert plain(state)
        other.memory, other.interrupt = driver.memory, guest.device.interrupt
        other.restore(state)
        running = threading.Event()
        loop = guest.loop.loop

        def run() -> None:
            guest.device.quiet = True
            other.loop_running(loop)
            other.resume()
            running.set()

        guest.loop.call(run)
        assert running.wait(30)
        old = guest.device
        guest.device = driver.device = driver.transport.device = other
        told = [guest.told()[:3] for _ in range(3)]
        assert told == [
            (1, console.PORT_NAME, 1), (1, console.PORT_OPEN, 1), (1, console.PORT_OPEN, 0),
        ]  # fmt: skip
        guest.control(1, console.PORT_OPEN)
        guest.give(4)
        assert guest.take(4) == b"typed"
        with socket.socket(socket.AF_UNIX) as again:
            again.connect(str(tmp_path / "new"))
            assert guest.told()[:3] == (1, console.PORT_OPEN, 1)
            guest.put(5, b"again")
            assert again.recv(100) == b"again"
        old._loop = None


# --- transports -----------------------------------------------------------------------------------


class Upper(VirtioDevice):
    ID, QUEUES = 63, (64,)

    def request(self, index: int, chain: Chain) -> int:
        return chain.write(chain.read().upper())


@pytest.mark.parametrize("kind", [Driver, PciDriver])
def test_an_interrupt_the_driver_may_not_have_seen(kind: type[Driver]) -> None:
    with kind(Upper("upper")) as driver:
        driver.memory.write(BUFFERS, b"abc")
        driver.rings[0].add([(BUFFERS, 3, False), (BUFFERS + 64, 3, True)])
        driver.kick()
        state = driver.transport.save()
        assert driver.take_interrupts()
        driver.transport.restore(state)
        assert not driver.take_interrupts()
        driver.transport.resume()
        assert driver.take_interrupts() & 1
        driver.transport.resume()  # after a mere pause
        assert not driver.take_interrupts()


def test_a_broken_device_stays_so() -> None:
    with Driver(Upper("upper")) as driver:
        driver.rings[0].add([(1 << 40, 4, True)])
        driver.kick()
        state = driver.transport.save()
        driver.transport.restore(state)
        driver.transport.resume()
        assert driver.read(mmio.STATUS) & spec.DEVICE_NEEDS_RESET
        driver.rings[0].add([(BUFFERS, 4, True)])
        driver.kick()
        assert driver.rings[0].used() == []


def test_what_others_serve_cannot_be_saved(tmp_path: Path) -> None:
    share = Share(str(tmp_path), tag="x").open()
    try:
        with pytest.raises(StateError, match=r"fs-x is served by another process \(virtiofsd\)"):
            share.save()
        with pytest.raises(StateError, match="cannot be restored"):
            share.restore({})
    finally:
        share.close()
    assert not os.path.exists(str(tmp_path / "vhost-user"))

"""vmm/block/vhost_user.py: --vhost-user-blk, with a real qemu-storage-daemon behind it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.blk_backend import BlkBackend
from tests.test_virtio_vhost_user import (
    External,
    ask,
    blocks,
    statuses,
    until_reset_is_needed,
)
from vmm import MachineConfig
from vmm.block.storage_daemon import ExternalDisk
from vmm.block.vhost_user import VhostUserBlk
from vmm.errors import HostError, StateError, UsageError
from vmm.virtio import blk, mmio
from vmm.virtio.vhost_user import AWAY, SERVED, VhostUserDevice, dial
from vmm.virtio.vhost_user_wire import Connection

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MIB))
    return path


@pytest.fixture
def serve(tmp_path: Path, image: Path) -> Iterator[Callable[..., BlkBackend]]:
    made: list[BlkBackend] = []

    def start(**how: object) -> BlkBackend:
        made.append(BlkBackend(image, tmp_path / f"{len(made)}.sock", **how))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for each in made:
        each.kill()


def test_a_disk(serve: Callable[..., BlkBackend], image: Path) -> None:
    with External(VhostUserBlk(str(serve().socket)).open(3)) as driver:
        assert driver.device.name == "vhost-user-blk3"
        assert driver.read(mmio.CONFIG) == MIB // 512
        assert blocks(driver, blk.T_IN, 8, 4096) == image.read_bytes()[4096:8192]
        blocks(driver, blk.T_OUT, 8, b"y" * 4096)
        blocks(driver, blk.T_FLUSH, 0, 0)
        assert image.read_bytes()[4096:8192] == b"y" * 4096
        assert not driver.features >> blk.F_RO & 1


def test_a_snapshot_is_refused_and_the_disk_goes_on(
    serve: Callable[..., BlkBackend], image: Path
) -> None:
    with External(VhostUserBlk(str(serve().socket)).open(0)) as driver:
        assert blocks(driver, blk.T_IN, 8, 512) == image.read_bytes()[4096:4608]
        for call in (driver.device.hold, driver.device.save, driver.transport.save):
            with pytest.raises(StateError, match="vhost-user-blk0 is served by another process"):
                call()
        assert blocks(driver, blk.T_IN, 16, 512) == image.read_bytes()[8192:8704]


def test_queues(serve: Callable[..., BlkBackend], image: Path) -> None:
    backend = serve(queues=4)
    with External(VhostUserBlk(str(backend.socket), queues=3).open(0)) as driver:
        assert driver.read(mmio.CONFIG + 34, 2) == 3
        for index in range(3):
            assert blocks(driver, blk.T_IN, 1, 512, index) == image.read_bytes()[512:1024]
    with pytest.raises(HostError, match=r"^--vhost-user-blk .*0.sock: .* has 4 queues, not 5$"):
        VhostUserBlk(str(backend.socket), queues=5).open(0)


def test_readonly(serve: Callable[..., BlkBackend]) -> None:
    """It is the back end that writes or not: only its word is good enough."""
    with pytest.raises(UsageError, match="readonly, but the back end serves it writable; start"):
        VhostUserBlk(str(serve().socket), readonly=True).open(0)
    disk = VhostUserBlk(str(serve(writable=False).socket), readonly=True).open(0)
    with External(disk) as driver:
        assert driver.features >> blk.F_RO & 1


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--vhost-user-blk .*x: cannot connect.*No such file"):
        VhostUserBlk(str(tmp_path / "x")).open(0)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "x"))
        with pytest.raises(UsageError, match="Connection refused"):
            VhostUserBlk(str(tmp_path / "x")).open(0)


def test_somebody_else_listens(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "x"))
        listener.listen()
        import threading

        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        with pytest.raises(HostError, match=r"^--vhost-user-blk .*x: .*(closed|reset|pipe)"):
            VhostUserBlk(str(tmp_path / "x")).open(0)


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("/run/a.sock", VhostUserBlk("/run/a.sock")),
        ("a,,b,queues=4,readonly", VhostUserBlk("a,b", queues=4, readonly=True)),
        ("a,readonly=off", VhostUserBlk("a")),
    ],
)
def test_what_is_said(text: str, disk: VhostUserBlk) -> None:
    config = MachineConfig(vhost_user_blks=[text])
    assert config.vhost_user_blks == (disk,)
    assert config.backing == "memfd"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "--vhost-user-blk: no socket; say --vhost-user-blk /run/disk.sock"),
        ("x,queues=0", "--vhost-user-blk x: queues=0 is not from 1 to 16"),
        ("x,queues=17", "--vhost-user-blk x: queues=17 is not from 1 to 16"),
        ("x,queues=two", "--vhost-user-blk x,queues=two: queues=two is not from 1 to 16"),
        ("x,ro", "--vhost-user-blk x,ro: 'ro' is not queues=N or readonly"),
        ("x,readonly=yes", "'readonly=yes' is not queues=N or readonly"),
        ("x" * 108, "108 bytes are too long for a socket's name"),
    ],
)
def test_what_cannot_be(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        VhostUserBlk.parse(text)
    assert says in str(caught.value)


# --- a back end that goes, and comes back ---------------------------------------------------------


class Recording(ExternalDisk):
    """With a record of requests under way, which the daemon keeps, though it does not offer it."""

    def __init__(self, backend: BlkBackend) -> None:
        path = str(backend.socket)
        self._force_inflight = True
        super().__init__("disk", dial(path, "x"), backend.queues, redial=lambda: dial(path, "x"))

    def _introduce(self, connection: Connection) -> int:
        self._force_inflight = True
        return super()._introduce(connection)


def until(state: str, disk: VhostUserDevice) -> None:
    limit = time.monotonic() + 30
    while disk.state != state:
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_idle_ones_are_not_missed(serve: Callable[..., BlkBackend], image: Path) -> None:
    """Nothing was under way: the rings alone say where to go on."""
    backend = serve()
    disk = VhostUserBlk(str(backend.socket)).open(0)
    with External(disk) as driver:
        for number in range(20):
            blocks(driver, blk.T_IN, number, 512)
        for _ in range(3):
            backend.kill()
            until(AWAY, disk)
            place = ask(driver, 7)  # waits
            backend.start()
            assert statuses(driver, [place]) == [blk.S_OK]
            assert driver.memory.read(place - 0xF00, 512) == image.read_bytes()[3584:4096]
        assert driver.errors == [
            f"vhost-user-blk0: {backend.socket} has ended; requests wait until it is back",
            f"vhost-user-blk0: {backend.socket} is back",
        ] * 3  # fmt: skip


def test_what_it_had_taken_is_done_by_its_successor(
    serve: Callable[..., BlkBackend], image: Path
) -> None:
    backend = serve(slow=True)
    disk = Recording(backend)
    with External(disk) as driver:
        places = [ask(driver, number) for number in range(4)]
        limit = time.monotonic() + 20
        while not disk._heads(0):
            assert time.monotonic() < limit
        backend.kill()
        until(AWAY, disk)
        places.append(ask(driver, 4))
        backend.slow = False
        backend.start()
        assert set(statuses(driver, places)) == {blk.S_OK}
        data = image.read_bytes()
        for number, place in enumerate(places):
            assert driver.memory.read(place - 0xF00, 512) == data[512 * number : 512 * number + 512]
        assert disk._heads(0) == []


def test_without_a_record_the_driver_must_reset(serve: Callable[..., BlkBackend]) -> None:
    backend = serve(slow=True)
    disk = VhostUserBlk(str(backend.socket)).open(0)
    with External(disk) as driver:
        for number in range(4):
            ask(driver, number)
        driver.wait(0)
        backend.kill()
        until_reset_is_needed(driver)
        driver.start()  # before it is back, and is served then
        places = [ask(driver, number) for number in range(3)]
        backend.slow = False
        backend.start()
        assert statuses(driver, places) == [blk.S_OK] * 3


def test_it_comes_back_as_another_disk(serve: Callable[..., BlkBackend], image: Path) -> None:
    backend = serve()
    disk = VhostUserBlk(str(backend.socket)).open(0)
    with External(disk) as driver:
        backend.kill()
        until(AWAY, disk)
        os.truncate(image, 2 * MIB)
        generation = driver.read(mmio.CONFIG_GENERATION)
        backend.start()
        until(SERVED, disk)
        limit = time.monotonic() + 20
        while driver.read(mmio.CONFIG_GENERATION) == generation:
            assert time.monotonic() < limit
        assert driver.read(mmio.CONFIG) == 2 * MIB // 512
        blocks(driver, blk.T_IN, 3000, 512)


def test_one_that_is_away_can_be_reset_and_closed(serve: Callable[..., BlkBackend]) -> None:
    backend = serve()
    disk = VhostUserBlk(str(backend.socket)).open(0)
    with External(disk) as driver:
        backend.kill()
        until(AWAY, disk)
        driver.start()
        driver.write(mmio.CONFIG + blk.WRITEBACK, 0, 1)


def told(driver: External, count: int) -> None:
    """Wait until so many lines are told."""
    limit = time.monotonic() + 20
    while len(driver.errors) < count:
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_readonly_holds_when_it_comes_back(serve: Callable[..., BlkBackend], image: Path) -> None:
    """A successor that would let the guest write is no successor, also for a driver that starts
    anew meanwhile."""
    before = image.read_bytes()
    backend = serve(writable=False)
    disk = VhostUserBlk(str(backend.socket), readonly=True).open(0)
    with External(disk) as driver:
        backend.kill()
        until(AWAY, disk)
        backend.writable = True
        backend.start()
        told(driver, 2)
        driver.start()  # the driver resets, and negotiates anew
        assert disk.features >> blk.F_RO & 1
        place = ask(driver, 0, blk.T_OUT)
        time.sleep(1.0)  # it is looked for four times
        assert driver.rings[0].used() == []
        assert disk.state == AWAY
        assert driver.errors[1:] == [
            f"vhost-user-blk0: {backend.socket} is back, but serves the disk writable, and "
            "readonly was asked for; requests wait until one is back that fits"
        ]
        backend.kill()
        backend.writable = False
        backend.start()
        assert statuses(driver, [place]) == [blk.S_IOERR]  # the guest wrote to a read-only disk
        blocks(driver, blk.T_IN, 0, 512)
        told(driver, 3)
        assert driver.errors[2:] == [f"vhost-user-blk0: {backend.socket} is back"]
    assert image.read_bytes() == before


def test_one_that_comes_back_with_less(serve: Callable[..., BlkBackend], image: Path) -> None:
    """Fewer queues: not taken. Less of a disk, or a read-only one: taken, and told."""
    backend = serve(queues=2)
    disk = VhostUserBlk(str(backend.socket), queues=2).open(0)
    with External(disk) as driver:
        backend.kill()
        until(AWAY, disk)
        backend.queues = 1
        backend.start()
        told(driver, 2)
        assert driver.errors[1] == (
            f"vhost-user-blk0: {backend.socket} has 1 queues, not 2; requests wait until one is "
            "back that fits"
        )
        backend.kill()
        backend.queues, backend.writable = 2, False
        size = image.stat().st_size
        os.truncate(image, size // 2)
        backend.start()
        until(SERVED, disk)
        blocks(driver, blk.T_IN, 0, 512, 1)
        told(driver, 3)
        assert driver.errors[2] == (
            f"vhost-user-blk0: {backend.socket} is back, read-only now and with {size // 2} bytes, "
            f"not {size}"
        )
        assert driver.read(mmio.CONFIG) == size // 2 // 512

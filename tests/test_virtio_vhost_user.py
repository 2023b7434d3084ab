"""vmm/virtio/{vhost_user,fs}.py, vmm/block/storage_daemon.py: real back ends, our driver's side."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.external import External
from tests.support.virtio_driver import BUFFERS
from vmm.block.drive import Drive
from vmm.block.storage_daemon import ExternalDisk
from vmm.errors import HostError, StateError, UsageError
from vmm.memory import GuestMemory
from vmm.virtio import blk, mmio, spec
from vmm.virtio.fs import Share
from vmm.virtio.vhost_user import DEAD, VhostUserDevice

MIB = 1 << 20


def blocks(driver: External, kind: int, sector: int, data: bytes | int, queue: int = 0) -> bytes:
    memory, write = driver.memory, isinstance(data, int)
    size = data if isinstance(data, int) else len(data)
    memory.write(BUFFERS, struct.pack("<IIQ", kind, 0, sector))
    memory.write_u8(BUFFERS + 0x100, 0xAA)
    if not isinstance(data, int):
        memory.write(BUFFERS + 0x1000, data)
    middle = [(BUFFERS + 0x1000, size, write)] if size else []
    driver.rings[queue].add([(BUFFERS, 16, False), *middle, (BUFFERS + 0x100, 1, True)])
    driver.kick(queue)
    driver.wait(queue)
    assert memory.read_u8(BUFFERS + 0x100) == blk.S_OK
    return memory.read(BUFFERS + 0x1000, size) if write else b""


@pytest.fixture
def qcow2(tmp_path: Path) -> Callable[..., str]:
    """Makes an image by the daemon itself, which is the one program for it we need anyway."""

    def make(size: int, backing: Path | None = None) -> str:
        path = str(tmp_path / "disk.qcow2")
        below = f',"backing-file":"{backing}","backing-fmt":"raw"' if backing else ""
        Path(path).touch()
        steps = [
            '{"execute":"qmp_capabilities"}',
            '{"execute":"blockdev-add","arguments":{"driver":"file","node-name":"f",'
            f'"filename":"{path}"}}}}',
            '{"execute":"blockdev-create","arguments":{"job-id":"j","options":'
            f'{{"driver":"qcow2","file":"f","size":{size}{below}}}}}}}',
        ]
        with subprocess.Popen(
            ["qemu-storage-daemon", "--chardev", "stdio,id=m", "--monitor", "m"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as daemon:  # fmt: skip
            assert daemon.stdin is not None and daemon.stdout is not None
            daemon.stdin.write("\n".join(steps) + "\n")
            daemon.stdin.flush()
            for line in daemon.stdout:
                if '"concluded"' in line:
                    break
            daemon.terminate()
        return path

    return make


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_qcow2_disk(qcow2: Callable[..., str], event_idx: bool) -> None:
    path = qcow2(64 * MIB)
    disk = Drive(path, format="qcow2").open(0)
    assert isinstance(disk, VhostUserDevice)
    with External(disk, event_idx=event_idx) as driver:
        assert driver.read(mmio.CONFIG) == 64 * MIB // 512
        data = os.urandom(65536)
        blocks(driver, blk.T_OUT, 1000, data)
        assert driver.take_interrupts() == 1
        blocks(driver, blk.T_FLUSH, 0, 0)
        assert blocks(driver, blk.T_IN, 1000, len(data)) == data
        driver.start()  # reset, and again
        assert blocks(driver, blk.T_IN, 1000, len(data)) == data
    again = Drive(path, format="qcow2", readonly=True).open(0)
    assert isinstance(again, VhostUserDevice)
    with External(again) as driver:
        assert driver.features >> blk.F_RO & 1
        assert blocks(driver, blk.T_IN, 1000, len(data)) == data
    with open(path, "rb") as file:
        assert file.read(4) == b"QFI\xfb"


def test_a_qcow2_disk_with_a_limit(qcow2: Callable[..., str]) -> None:
    disk = Drive.parse(f"{qcow2(MIB)},format=qcow2,bps=1M,burst=2M,iops=100").open(0)
    assert isinstance(disk, ExternalDisk)
    with External(disk) as driver:
        for number in range(15):  # of 10 requests at once
            blocks(driver, blk.T_OUT, number, b"x" * 512)
            assert blocks(driver, blk.T_IN, number, 512) == b"x" * 512
        assert disk.limit.rates == (MIB, 100)
        with pytest.raises(UsageError, match=r"qemu-storage-daemon: bps_max.* than bps"):
            disk.limit.change(bytes=10, burst_bytes=5)
        disk.limit.change()
        assert disk.limit.rates == (0, 0)
        for number in range(50):
            blocks(driver, blk.T_IN, number, 512)
        disk.limit.change(bytes=1)
        places = [ask(driver, number) for number in range(5)]
        driver.wait(0)
        time.sleep(0.1)
        assert driver.rings[0].used() == []  # they wait for minutes each
        kill("qemu-storage")
        assert statuses(driver, places[1:]) == [blk.S_IOERR] * 4
        with pytest.raises(HostError, match="qemu-storage-daemon: its monitor does not answer"):
            disk.limit.change(bytes=10)
    other = Drive.parse(f"{qcow2(MIB)},format=qcow2").open(0)
    with pytest.raises(StateError, match="blk0: no limit to change; start with one"):
        other.limit  # type: ignore[attr-defined]  # noqa: B018
    other.close()
    assert leftovers() == []


def test_two_on_one_image_are_refused(qcow2: Callable[..., str]) -> None:
    path = qcow2(MIB)
    first = Drive(path, format="qcow2").open(0)
    try:
        with pytest.raises(HostError, match=r"disk.qcow2: another process uses this image"):
            Drive(path, format="qcow2").open(1)
    finally:
        first.close()


def leftovers() -> list[str]:
    """This process's children."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def kill(program: str, signum: int = signal.SIGKILL) -> None:
    """Signal a child of ours, or what serves in its place: virtiofsd's own child."""
    pids = [pid for pid in leftovers() if Path(f"/proc/{pid}/comm").read_text().startswith(program)]
    assert len(pids) == 1
    while pids:
        pid = pids[0]
        pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(pid), signum)
    limit = time.monotonic() + 20
    while signum == signal.SIGSTOP and not all(
        stat.read_text().rsplit(")", 1)[1].split()[0] == "T"
        for stat in Path(f"/proc/{pid}/task").glob("*/stat")
    ):  # one of its threads may be about to take a request
        assert time.monotonic() < limit


def ask(driver: External, number: int, kind: int = blk.T_IN) -> int:
    """A request for sector `number`, not waited for; where its status will be."""
    at = BUFFERS + 0x2000 * number
    driver.memory.write(at, struct.pack("<IIQ", kind, 0, number))
    driver.memory.write_u8(at + 0x1000, 0xAA)
    driver.rings[0].add([(at, 16, False), (at + 0x100, 512, True), (at + 0x1000, 1, True)])
    driver.kick(0)
    return at + 0x1000


def statuses(driver: External, places: list[int]) -> list[int]:
    """What requests were answered, once they all were."""
    done, limit = 0, time.monotonic() + 30
    while done < len(places):
        assert time.monotonic() < limit, driver.errors
        done += len(driver.rings[0].used())
        time.sleep(0.001)
    assert done == len(places)
    return [driver.memory.read_u8(place) for place in places]


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_disk_whose_daemon_dies_gives_errors(qcow2: Callable[..., str], event_idx: bool) -> None:
    """For what the daemon had taken, and for all that comes; also after a reset."""
    disk = Drive(qcow2(MIB), format="qcow2", bps=1).open(0)
    assert isinstance(disk, VhostUserDevice)
    with External(disk, event_idx=event_idx) as driver:
        places = [ask(driver, number) for number in range(5)]
        # The first is answered; the daemon has the others, and keeps them for minutes.
        driver.wait(0)
        limit = time.monotonic() + 20
        while len(disk._heads(0)) < 4:
            assert time.monotonic() < limit
        kill("qemu-storage")
        assert statuses(driver, places[1:]) == [blk.S_IOERR] * 4
        assert driver.memory.read_u8(places[0]) == blk.S_OK
        assert statuses(driver, [ask(driver, 9)]) == [blk.S_IOERR]
        assert driver.take_interrupts() & 1
        driver.start()
        assert statuses(driver, [ask(driver, number) for number in range(3)]) == [blk.S_IOERR] * 3
        driver.rings[0].add([(BUFFERS, 16, False)])  # without room for a status
        driver.kick(0)
        until_reset_is_needed(driver)
        assert driver.errors[0] == (
            "blk0: qemu-storage-daemon was killed by SIGKILL; the guest gets I/O errors from now on"
        )
    assert leftovers() == []


def until_reset_is_needed(driver: External) -> None:
    limit = time.monotonic() + 20
    while not driver.read(mmio.STATUS) & spec.DEVICE_NEEDS_RESET:
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_a_directory_whose_daemon_dies(tmp_path: Path) -> None:
    share = Share.parse(f"{tmp_path},tag=data").open()
    with External(share) as driver:
        for _ in range(3):
            assert fuse_init(driver) == 0
        driver.take_interrupts()
        kill("virtiofsd")
        limit = time.monotonic() + 20
        while share.state != DEAD:
            assert time.monotonic() < limit
        assert fuse_init(driver) == -errno.EIO
        assert driver.take_interrupts() & 1
        driver.rings[0].add([(BUFFERS, 56, False)])  # as FUSE_FORGET, without an answer
        driver.kick(0)
        driver.wait(0)
        driver.start()
        assert fuse_init(driver) == -errno.EIO
        assert driver.errors == [
            "fs-data: virtiofsd has ended (status 1); the guest gets I/O errors from now on"
        ]
    assert leftovers() == []


def test_a_directory_whose_daemon_dies_with_requests(tmp_path: Path) -> None:
    """Which of them it has taken is not known: the rings must begin anew."""
    share = Share.parse(f"{tmp_path},tag=data").open()
    with External(share) as driver:
        assert fuse_init(driver) == 0  # it is there, with its child
        driver.take_interrupts()
        kill("virtiofsd", signal.SIGSTOP)
        driver.rings[1].add([(BUFFERS, 56, False), (BUFFERS + 0x1000, 256, True)])
        driver.kick(1)
        kill("virtiofsd")
        until_reset_is_needed(driver)
        limit = time.monotonic() + 20
        while not driver.take_interrupts() & 2:
            assert time.monotonic() < limit
        assert driver.errors == [
            "fs-data: virtiofsd has ended (status 1); the driver must reset the device"
        ]
        driver.start()
        assert fuse_init(driver) == -errno.EIO
    assert leftovers() == []


def fuse_request(opcode: int, data: bytes) -> bytes:
    """struct fuse_in_header (len, opcode, unique, ...), and more."""
    return struct.pack("<IIQQIIII", 40 + len(data), opcode, 7, 0, 0, 0, 0, 0) + data


def fuse_answer(driver: External) -> int:
    """The error in the answer to the one request there is."""
    driver.wait(1)
    _, error, unique = struct.unpack("<IiQ", driver.memory.read(BUFFERS + 0x1000, 16))
    assert unique == 7
    return int(error)


def fuse_init(driver: External) -> int:
    request = fuse_request(26, struct.pack("<IIII", 7, 31, 0, 0))
    driver.memory.write(BUFFERS, request)
    driver.rings[1].add([(BUFFERS, len(request), False), (BUFFERS + 0x1000, 256, True)])
    driver.kick(1)
    return fuse_answer(driver)


def test_a_directory(tmp_path: Path) -> None:
    """FUSE_INIT goes to virtiofsd and comes back."""
    share = Share.parse(f"{tmp_path},tag=data").open()
    with External(share) as driver:
        assert driver.memory.regions[0].fd >= 0
        config = bytes(driver.read(mmio.CONFIG + at, 1) for at in range(40))
        assert config == b"data".ljust(36, b"\0") + struct.pack("<I", 1)
        # struct fuse_in_header (len, opcode INIT, unique, ...), struct fuse_init_in 7.31
        request = struct.pack("<IIQQIIII", 40 + 16, 26, 7, 0, 0, 0, 0, 0)
        request += struct.pack("<IIII", 7, 31, 0, 0)
        driver.memory.write(BUFFERS, request)
        driver.rings[1].add([(BUFFERS, len(request), False), (BUFFERS + 0x1000, 256, True)])
        driver.kick(1)
        _, written = driver.wait(1)
        size, error, unique = struct.unpack("<IiQ", driver.memory.read(BUFFERS + 0x1000, 16))
        assert (size, error, unique) == (written, 0, 7)
        assert struct.unpack("<I", driver.memory.read(BUFFERS + 0x1010, 4))[0] == 7
    assert leftovers() == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "no tag; say --fs"),
        ("{},tag=", "no tag"),
        ("{},tag=" + "x" * 37, "longer than 36 bytes"),
        ("{}/none,tag=x", "no such directory"),
        ("{},readonly=yes,tag=x", "'readonly=yes' is not tag=NAME, readonly, suid or dev"),
        ("{},ro,tag=x", "'ro' is not tag=NAME, readonly, suid or dev"),
    ],
)
def test_shares_that_cannot_be(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Share.parse(text.format(tmp_path)).check_host()


def test_private_memory_cannot_be_shared(tmp_path: Path) -> None:
    share = Share(str(tmp_path), tag="x").open()
    share.memory = GuestMemory(MIB)
    try:
        with pytest.raises(UsageError, match="needs shared guest memory"):
            share.connect([])
    finally:
        share.close()
        share.memory.close()

"""vmm/block/nbd.py: images of every format under this process's own disk device."""

from __future__ import annotations

import os
import random
import resource
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import images
from tests.support.virtio_driver import Driver
from tests.test_virtio_blk import request, submit, wait_used
from tests.test_virtio_vhost_user import External, blocks, kill, leftovers
from vmm.block import nbd
from vmm.block.drive import Drive
from vmm.block.nbd import NbdImage
from vmm.block.overlay import Overlay
from vmm.block.storage_daemon import ExternalDisk
from vmm.errors import HostError, UsageError
from vmm.virtio import blk
from vmm.virtio.blk import Block

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "raw.img"
    path.write_bytes(random.Random(4).randbytes(SIZE - MIB) + bytes(MIB))
    return path


@pytest.mark.parametrize("format", images.FORMATS)
def test_each_format_is_the_disk_that_was_converted(tmp_path: Path, raw: Path, format: str) -> None:
    """Both ways, and what is written is what qemu-img finds."""
    if format == "qcow2":
        path = images.convert(raw, tmp_path / "disk", format, "-o", "cluster_size=4k")
    else:
        path = images.convert(raw, tmp_path / "disk", format)
    want = bytearray(images.contents(path, format))
    assert want[:SIZE] == raw.read_bytes()
    name = f"{path},format={format}"

    disk = Drive.parse(f"{name},serial=S-1,werror=stop,queues=2").open(0)
    assert isinstance(disk, Block) and isinstance(disk.image, NbdImage)
    assert disk.image.size == len(want)
    chance = random.Random(5)
    with Driver(disk) as driver:
        assert request(driver, blk.T_GET_ID, into=20)[1].rstrip(b"\0") == b"S-1"
        for _ in range(40):
            sector = chance.randrange(SIZE // 512 - 64)
            size = 512 * chance.randint(1, 60)
            if chance.random() < 0.5:
                data = chance.randbytes(size)
                assert request(driver, blk.T_OUT, sector, out=data)[0] == blk.S_OK
                want[512 * sector : 512 * sector + size] = data
            got = request(driver, blk.T_IN, sector, into=size)
            assert got == (blk.S_OK, want[512 * sector : 512 * sector + size])
        assert request(driver, blk.T_FLUSH)[0] == blk.S_OK
        zeroes = struct.pack("<QII", 3, 99, 1)
        assert request(driver, blk.T_WRITE_ZEROES, out=zeroes)[0] == blk.S_OK
        want[3 * 512 : 102 * 512] = bytes(99 * 512)
        assert request(driver, blk.T_DISCARD, out=struct.pack("<QII", 8000, 100, 0))[0] == blk.S_OK
    disk.close()
    assert images.contents(path, format)[: 7000 * 512] == want[: 7000 * 512]

    before = path.read_bytes()
    disk = Drive.parse(f"{name},snapshot").open(0)
    assert isinstance(disk, Block) and isinstance(disk.image, Overlay)
    with Driver(disk) as driver:
        assert request(driver, blk.T_OUT, 9, out=b"z" * 512)[0] == blk.S_OK
        assert request(driver, blk.T_IN, 8, into=1536)[1] == (
            want[8 * 512 : 9 * 512] + b"z" * 512 + want[10 * 512 : 11 * 512]
        )
    disk.close()
    assert path.read_bytes() == before

    external = Drive.parse(f"{name},readonly").open(0)
    assert isinstance(external, ExternalDisk)
    with External(external) as guest:
        for sector in range(0, 6000, 1000):
            at = sector * 512
            assert blocks(guest, blk.T_IN, sector, 65536) == want[at : at + 65536]
    assert leftovers() == []


def test_a_qcow2_image_in_a_block_device(tmp_path: Path, loop_device: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", loop_device, "4M"], check=True)
    with pytest.raises(UsageError, match="looks like a qcow2 image"):
        Drive.parse(loop_device).open(0)
    disk = Drive.parse(f"{loop_device},format=qcow2").open(0)
    assert isinstance(disk, ExternalDisk)
    with External(disk) as guest:
        blocks(guest, blk.T_OUT, 5, b"a" * 512)
    for more in (",serial=1", ",snapshot", ",cache=none,serial=1"):
        disk = Drive.parse(f"{loop_device},format=qcow2{more}").open(0)
        assert isinstance(disk, Block)
        with Driver(disk) as driver:
            assert request(driver, blk.T_IN, 5, into=512)[1] == b"a" * 512
            assert request(driver, blk.T_OUT, 1, out=b"b" * 512)[0] == blk.S_OK
        disk.close()


def test_many_requests_at_once_and_large_ones(tmp_path: Path, raw: Path) -> None:
    path = images.convert(raw, tmp_path / "disk", "qcow2")
    disk = Drive.parse(f"{path},format=qcow2,serial=1").open(0)
    assert isinstance(disk, Block)
    image, want, failures = disk.image, raw.read_bytes(), []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(50):
            offset = 512 * chance.randrange(SIZE // 512 - 200)
            sizes = [512 * chance.randint(1, 20) for _ in range(chance.randint(1, 9))]
            views = [memoryview(bytearray(size)) for size in sizes]
            image.read(views, offset)
            if b"".join(views) != want[offset : offset + sum(sizes)]:
                failures.append(offset)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    views = [memoryview(bytearray(1024)) for _ in range(SIZE // 1024)]  # more than an iovec takes
    image.read(views, 0)
    assert b"".join(views) == want
    image.write([memoryview(bytes(1024)), *views[1:]], 0)
    image.read(views[:1], 0)
    assert views[0] == bytes(1024)
    disk.close()


def test_no_space_left_pauses(tmp_path: Path) -> None:
    """As with a raw image; ENOSPC comes through the daemon."""
    if os.geteuid():
        pytest.skip("mounts; needs root")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], check=True)
    try:
        path = images.make(place / "disk", "qcow2", 16 * MIB)
        why: list[str] = []
        disk = Drive.parse(f"{path},format=qcow2,werror=stop").open(0)
        disk.on_stop = why.append
        with Driver(disk) as driver:
            for number in range(64):
                submit(driver, blk.T_OUT, number * 128, out=b"f" * 65536)
                while not why and not (done := driver.rings[0].used()):
                    time.sleep(0.001)
                if why:
                    break
                assert done
            assert why == [f"blk0: {path}: write: No space left on device"]
            subprocess.run(["mount", "-o", "remount,size=9m", place], check=True)
            disk.resumed()
            wait_used(driver)
            assert request(driver, blk.T_IN, number * 128, into=512)[1] == b"f" * 512
        disk.close()
        disk = Drive.parse(f"{images.make(place / 'two', 'qcow2', 16 * MIB)},format=qcow2").open(0)
        assert isinstance(disk, ExternalDisk)  # this one reports it to the guest
        disk.close()
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_daemon_that_dies(tmp_path: Path) -> None:
    path = images.make(tmp_path / "disk", "vdi", MIB)
    disk = Drive.parse(f"{path},format=vdi,serial=1").open(0)
    said: list[str] = []
    disk.on_error = said.append
    with Driver(disk) as driver:
        assert request(driver, blk.T_IN, 0, into=512)[0] == blk.S_OK
        kill("qemu-storage")
        for kind, more in ((blk.T_IN, {"into": 512}), (blk.T_OUT, {"out": bytes(512)})):
            assert request(driver, kind, 0, **more)[0] == blk.S_IOERR  # type: ignore[arg-type]
        assert request(driver, blk.T_FLUSH)[0] == blk.S_IOERR
        assert said[0] == f"blk0: {path}: read at byte 0: the NBD server has ended"
    disk.close()
    assert leftovers() == []


def test_a_broken_image_is_refused_in_a_line(tmp_path: Path) -> None:
    path = images.make(tmp_path / "disk", "qcow2", MIB)
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack(">I", 99)
    path.write_bytes(data)
    before = os.listdir("/proc/self/fd")
    for more in ("", ",serial=1"):
        with pytest.raises(UsageError) as raised:
            Drive.parse(f"{path},format=qcow2{more}").open(0)
        said = str(raised.value)
        assert said.startswith(f"--drive {path}: qemu-storage-daemon: ") and "version 99" in said
        assert "{" not in said and "\n" not in said
    assert os.listdir("/proc/self/fd") == before and leftovers() == []


def serve(answer: Callable[[socket.socket], object]) -> tuple[socket.socket, threading.Thread]:
    """Our end of a connection that `answer` serves in a thread."""
    ours, theirs = socket.socketpair()

    def main() -> None:
        with theirs, suppress(OSError):
            answer(theirs)

    thread = threading.Thread(target=main)
    thread.start()
    return ours, thread


GREETING = b"NBDMAGICIHAVEOPT\0\1"
REPLY = struct.pack(">Q", 0x3E889045565A9)


@pytest.mark.parametrize(
    "says",
    [
        b"", b"HTTP/1.1 400 Bad\r\n\r\n", GREETING[:10], GREETING[:17] + b"\0",
        GREETING + REPLY + struct.pack(">III", 7, 0x80000006, 4) + b"none",
        GREETING + REPLY + struct.pack(">III", 7, 3, 1 << 30),
        GREETING + REPLY + struct.pack(">III", 9, 1, 0),
        GREETING + REPLY + struct.pack(">III", 7, 3, 2) + b"\0\0",
        GREETING + (REPLY + struct.pack(">III", 7, 3, 2) + b"\0\7") * 200,
    ],
)  # fmt: skip
def test_a_server_that_is_none(says: bytes) -> None:
    ours, thread = serve(lambda sock: sock.sendall(says))
    with pytest.raises(HostError, match="--drive x: "):
        NbdImage("x", [ours])
    assert ours.fileno() == -1
    thread.join()


def test_an_answer_out_of_order() -> None:
    def answer(sock: socket.socket) -> None:
        info = struct.pack(">HQH", 0, MIB, 1)
        sock.sendall(GREETING + REPLY + struct.pack(">III", 7, 3, len(info)) + info)
        sock.sendall(REPLY + struct.pack(">III", 7, 1, 0))
        while sock.recv(4096):
            sock.sendall(b"\xff" * 16)

    ours, thread = serve(answer)
    image = NbdImage("x", [ours])
    for _ in range(2):
        with pytest.raises(OSError, match=r"out of order|has ended"):
            image.read([memoryview(bytearray(512))], 0)
    image.close()
    thread.join()


@pytest.mark.parametrize("size", [(1 << 64) - 1, 1 << 63])
def test_a_size_that_no_file_has(size: int) -> None:
    info = struct.pack(">HQH", 0, size, 1)
    says = GREETING + REPLY + struct.pack(">III", 7, 3, len(info)) + info
    says += REPLY + struct.pack(">III", 7, 1, 0)
    ours, thread = serve(lambda sock: (sock.sendall(says), sock.recv(99), sock.recv(99)))
    with pytest.raises(HostError, match=f"a disk of {size} bytes"):
        NbdImage("x", [ours])
    thread.join()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (struct.pack(">IIQ", 0x67446698, (1 << 32) - 1, 0), "Input/output error"),
        (struct.pack(">IIQ", 0x67446698, 100_000, 0), "Input/output error"),
        (struct.pack(">IIQ", 0x67446698, 28, 0), "No space left"),
        (struct.pack(">IIQ", 0x67446698, 0, 7) + bytes(512), "out of order"),
    ],
)
def test_answers_that_lie(answer: bytes, says: str) -> None:
    """Each is an error of the request, and none ends the disk's thread."""

    def main(sock: socket.socket) -> None:
        info = struct.pack(">HQH", 0, MIB, 1)
        sock.sendall(GREETING + REPLY + struct.pack(">III", 7, 3, len(info)) + info)
        sock.sendall(REPLY + struct.pack(">III", 7, 1, 0))
        while sock.recv(4096):
            sock.sendall(answer)

    ours, thread = serve(main)
    image = NbdImage("x", [ours])
    with pytest.raises(OSError, match=says):
        image.read([memoryview(bytearray(512))], 0)
    image.close()
    thread.join()


def test_a_greeting_byte_by_byte_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "TIMEOUT", 0.3)
    over = threading.Event()

    def drip(sock: socket.socket) -> None:
        info = REPLY + struct.pack(">III", 7, 3, 4096) + bytes(4096)
        for byte in GREETING + info * 99:
            if over.wait(0.02):
                return
            sock.sendall(bytes([byte]))

    ours, thread = serve(drip)
    threading.Timer(30, over.set).start()
    begun = time.monotonic()
    with pytest.raises(HostError, match="has ended"):
        NbdImage("x", [ours])
    assert time.monotonic() - begun < 20
    over.set()
    thread.join()


def test_what_it_takes_is_given_back(tmp_path: Path) -> None:
    path = images.make(tmp_path / "disk", "qcow2", MIB)
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        Drive.parse(f"{path},format=qcow2,serial=1").open(0).close()
    assert os.listdir("/proc/self/fd") == before and leftovers() == []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + 4, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            Drive.parse(f"{path},format=qcow2,serial=1").open(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.listdir("/proc/self/fd") == before and leftovers() == []

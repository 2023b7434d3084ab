"""Disks that grow: vmm/block/growth.py, `Block.resize`, `ExternalDisk.resize`."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support import images
from tests.support.blk_backend import BlkBackend
from tests.support.virtio_driver import Driver
from tests.test_virtio_blk import request
from tests.test_virtio_vhost_user import External, blocks, leftovers
from vmm.block.drive import Drive
from vmm.block.frozen import Frozen
from vmm.block.nbd import NbdImage
from vmm.block.overlay import Overlay
from vmm.block.raw import RawImage
from vmm.block.storage_daemon import ExternalDisk
from vmm.block.vhost_user import VhostUserBlk
from vmm.child import Child
from vmm.errors import HostError, StateError, UsageError
from vmm.virtio import blk, mmio
from vmm.virtio.blk import Block

MIB = 1 << 20
CONFIG_CHANGED = 2
"""In the MMIO transport's interrupt status."""


def capacity(driver: Driver) -> int:
    """Bytes, as the guest reads them."""
    return 512 * (driver.read(mmio.CONFIG) | driver.read(mmio.CONFIG + 4) << 32)


@pytest.mark.parametrize("words", ["", ",cache=none", ",discard=off", ",logical-block-size=4096"])
def test_a_raw_disk(tmp_path: Path, words: str) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"a" * MIB)
    disk = Drive.parse(f"{path}{words}").open(0)
    assert isinstance(disk, Block)
    with Driver(disk) as driver:
        last = MIB // 512
        assert request(driver, blk.T_IN, 0, into=512) == (blk.S_OK, b"a" * 512)
        assert request(driver, blk.T_IN, last, into=512)[0] == blk.S_IOERR
        driver.take_interrupts()
        generation = driver.read(mmio.CONFIG_GENERATION)
        assert disk.resize(3 * MIB) == 3 * MIB
        assert driver.take_interrupts() & CONFIG_CHANGED
        assert driver.read(mmio.CONFIG_GENERATION) != generation
        assert capacity(driver) == 3 * MIB == path.stat().st_size
        assert request(driver, blk.T_IN, last, into=512) == (blk.S_OK, bytes(512))
        assert request(driver, blk.T_OUT, 6 * 1024 - 8, out=b"z" * 4096)[0] == blk.S_OK
        assert request(driver, blk.T_IN, 6 * 1024 - 8, into=4096)[1] == b"z" * 4096
        assert request(driver, blk.T_IN, 6 * 1024, into=512)[0] == blk.S_IOERR
        if "discard=off" in words:
            assert path.stat().st_blocks * 512 >= 3 * MIB
        for size, line in (
            (2 * MIB, "are less than the 3145728 that the disk has; a disk only grows"),
            (0, "0 is no size in bytes"), (1 << 80, "is no size in bytes"), (-512, "is no size"),
            (3 * MIB + 100, "3145828 bytes are not whole blocks of "),
        ):  # fmt: skip
            with pytest.raises(UsageError, match=line):
                disk.resize(size)
        assert disk.resize() == 3 * MIB
        assert not driver.take_interrupts() & CONFIG_CHANGED
        os.truncate(path, 4 * MIB + 77)  # by somebody else
        assert disk.resize() == 4 * MIB
        assert driver.take_interrupts() & CONFIG_CHANGED
        assert capacity(driver) == 4 * MIB
        os.truncate(path, MIB)
        with pytest.raises(UsageError, match="are less than the 4194304 that the disk has"):
            disk.resize()
        driver.start()
        assert capacity(driver) == 4 * MIB
    disk.close()


def test_what_cannot_grow(tmp_path: Path, loop_device: str) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    for name in (loop_device, f"{path},readonly"):
        disk = Drive.parse(name).open(0)
        assert isinstance(disk, Block)
        with pytest.raises(UsageError, match="only its owner can enlarge it, then say no size"):
            disk.resize(16 * MIB)
        if name == loop_device:
            os.truncate(tmp_path / "backing", 12 * MIB)
            subprocess.run(["losetup", "-c", loop_device], check=True)
        else:
            os.truncate(path, 12 * MIB)
        assert disk.resize() == 12 * MIB
        disk.close()


def test_a_file_system_that_is_full(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("mounts; needs root")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", place], check=True)
    try:
        (place / "disk").write_bytes(b"k" * MIB)
        disk = Drive.parse(f"{place}/disk,discard=off").open(0)
        assert isinstance(disk, Block)
        with Driver(disk) as driver:
            with pytest.raises(HostError, match="No space left on device"):
                disk.resize(64 * MIB)
            assert capacity(driver) == MIB
            assert request(driver, blk.T_IN, 9, into=512) == (blk.S_OK, b"k" * 512)
        disk.close()
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("size", [MIB, MIB + 512, 3 * 65536 + 1024])
def test_a_throw_away_overlay(tmp_path: Path, size: int) -> None:
    """The image below stays as it is; what it lacks is zero."""
    path = tmp_path / "disk"
    path.write_bytes(b"b" * size)
    disk = Drive.parse(f"{path},snapshot").open(0)
    assert isinstance(disk, Block)
    with Driver(disk) as driver:
        assert request(driver, blk.T_OUT, 3, out=b"w" * 512)[0] == blk.S_OK
        assert disk.resize(5 * MIB) == 5 * MIB
        model = bytearray(b"b" * size + bytes(5 * MIB - size))
        model[3 * 512 : 4 * 512] = b"w" * 512
        last = size // 512 - 2
        for sector in (0, last, last + 2, 5 * 2048 - 8):
            got = request(driver, blk.T_IN, sector, into=2048)
            assert got == (blk.S_OK, model[sector * 512 : sector * 512 + 2048])
        assert request(driver, blk.T_OUT, last, out=b"v" * 4096)[0] == blk.S_OK
        model[last * 512 : last * 512 + 4096] = b"v" * 4096
        got = request(driver, blk.T_IN, last - 2, into=8192)
        assert got[1] == model[(last - 2) * 512 :][:8192]
    disk.close()
    assert path.read_bytes() == b"b" * size


def test_an_image_below_that_grew(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"b" * MIB)
    disk = Drive.parse(f"{path},snapshot").open(0)
    assert isinstance(disk, Block)
    with Driver(disk) as driver:
        with path.open("ab") as file:
            file.write(b"c" * MIB)
        assert disk.resize() == 2 * MIB
        assert request(driver, blk.T_IN, 2050, into=512)[1] == b"c" * 512
        assert request(driver, blk.T_OUT, 2051, out=b"d" * 512)[0] == blk.S_OK
        assert request(driver, blk.T_IN, 2050, into=1536)[1] == b"c" * 512 + b"d" * 512 + b"c" * 512
    disk.close()


def test_a_disk_that_others_share(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    disk = Block(Overlay(Frozen(RawImage(str(path), readonly=True))), name="blk0")
    with pytest.raises(StateError, match="a checkpoint, or clones, share this disk"):
        disk.resize(2 * MIB)
    assert disk.resize() == MIB
    disk.close()


@pytest.mark.parametrize("words", ["", ",bps=100M", ",serial=1", ",snapshot"])
@pytest.mark.parametrize("format", images.FORMATS)
def test_other_formats(tmp_path: Path, format: str, words: str) -> None:
    path = images.make(tmp_path / "disk", format, MIB)
    before = os.listdir("/proc/self/fd")
    disk = Drive.parse(f"{path},format={format}{words}").open(0)
    assert isinstance(disk, (Block, ExternalDisk))
    with External(disk) if isinstance(disk, ExternalDisk) else Driver(disk) as driver:
        first = capacity(driver)
        if format not in ("qcow2", "qed") and words != ",snapshot":
            line = f"this image .format={format}. cannot grow to 8388608 bytes: qemu-storage-daem"
            with pytest.raises(UsageError, match=line):
                disk.resize(8 * MIB)
            assert capacity(driver) == first
            end = first // 512 - 1
        else:
            driver.take_interrupts()
            assert disk.resize(8 * MIB) == 8 * MIB
            assert driver.take_interrupts() & CONFIG_CHANGED
            assert capacity(driver) == 8 * MIB
            assert disk.resize() == 8 * MIB
            end = 8 * 2048 - 1
        if isinstance(driver, External):
            blocks(driver, blk.T_OUT, end, b"e" * 512)
            assert blocks(driver, blk.T_IN, end, 512) == b"e" * 512
        else:
            assert request(driver, blk.T_OUT, end, out=b"e" * 512)[0] == blk.S_OK
            assert request(driver, blk.T_IN, end, into=512)[1] == b"e" * 512
        with pytest.raises(UsageError, match="are less than"):
            disk.resize(512)
    disk.close()
    assert os.listdir("/proc/self/fd") == before and leftovers() == []


def test_somebody_elses_back_end(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    backend = BlkBackend(path, tmp_path / "s")
    try:
        disk = VhostUserBlk(str(tmp_path / "s")).open(0)
        assert isinstance(disk, ExternalDisk)
        with External(disk):
            with pytest.raises(UsageError, match="who serves this disk has it grow; then say no"):
                disk.resize(2 * MIB)
            assert disk.resize() == MIB
    finally:
        backend.kill()


def test_while_requests_are_under_way(tmp_path: Path) -> None:
    """None is lost or refused, whichever side of the change it falls on."""
    path = images.make(tmp_path / "disk", "qcow2", MIB)
    disk = Drive.parse(f"{path},format=qcow2,serial=1").open(0)
    assert isinstance(disk, Block)
    with Driver(disk) as driver:
        grown = threading.Thread(target=lambda: [disk.resize(n * MIB) for n in range(2, 7)])
        grown.start()
        for number in range(200):
            data = struct.pack("<Q", number) * 64
            assert request(driver, blk.T_OUT, number, out=data)[0] == blk.S_OK
            assert request(driver, blk.T_IN, number, into=512)[1] == data
        grown.join()
        assert capacity(driver) == 6 * MIB
    disk.close()


def test_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images.make(tmp_path / "disk", "qcow2", MIB)
    monkeypatch.chdir(tmp_path)
    disk = Drive.parse("disk,format=qcow2,serial=1").open(0)
    assert isinstance(disk, Block)
    monkeypatch.chdir("/")
    assert disk.resize(2 * MIB) == 2 * MIB
    disk.close()


def test_a_server_that_is_replaced_is_not_told_of_as_lost(tmp_path: Path) -> None:
    """Whenever the thread that has seen its end asks: while there is none, or once another is."""
    path = images.make(tmp_path / "disk", "qcow2", MIB)
    disk = Drive.parse(f"{path},format=qcow2,serial=1").open(0)
    try:
        assert isinstance(disk, Block) and isinstance(disk.image, NbdImage)
        said: list[str] = []
        disk.on_error = said.append
        ((_, gone),) = disk.peers
        again = disk.image._again
        assert again is not None

        def start(size: int) -> tuple[list[socket.socket], Child, UsageError | None]:
            gone()
            return again(size)

        disk.image._again = start
        assert disk.resize(2 * MIB) == 2 * MIB
        gone()
        assert said == []
    finally:
        disk.close()

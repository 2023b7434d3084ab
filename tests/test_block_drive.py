"""vmm/block/drive.py: what a person says, and every line that says what is wrong with it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from tests.support.virtio_driver import Driver
from tests.test_virtio_blk import request
from vmm.block.drive import Drive
from vmm.block.overlay import Overlay
from vmm.block.raw import RawImage
from vmm.errors import HostError, UsageError
from vmm.virtio import blk, mmio
from vmm.virtio.blk import Block

DEFAULTS = {
    "readonly": False, "format": "", "serial": "", "cache": "writeback", "queues": 1,
    "snapshot": False, "werror": "report", "discard": "unmap", "backing": (), "data_file": "",
    "logical_block_size": 512, "physical_block_size": 0, "bps": 0, "burst": 0,
    "iops": 0, "iops_burst": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "path", "values"),
    [
        ("disk.img", "disk.img", {}),
        ("/a b/c=d", "/a b/c=d", {}),
        ("a,,b.img", "a,b.img", {}),
        ("a,,,readonly", "a,", {"readonly": True}),
        ("x,readonly", "x", {"readonly": True}),
        ("x,readonly=on", "x", {"readonly": True}),
        ("x,readonly=off", "x", {}),
        ("x,readonly,readonly=off", "x", {}),
        ("x,snapshot", "x", {"snapshot": True}),
        ("x,snapshot=off", "x", {}),
        ("x,format=raw", "x", {"format": "raw"}),
        ("x,format=qcow2", "x", {"format": "qcow2"}),
        ("x,serial=", "x", {}),
        ("x,serial=a=b,,c", "x", {"serial": "a=b,c"}),
        ("x,serial=12345678901234567890", "x", {"serial": "1234567890" * 2}),
        ("x,cache=none,queues=16", "x", {"cache": "none", "queues": 16}),
        ("x,cache=unsafe,queues=01", "x", {"cache": "unsafe"}),
        ("x,werror=stop", "x", {"werror": "stop"}),
        ("x,format=qcow2,werror=stop", "x", {"format": "qcow2", "werror": "stop"}),
        ("x,format=vdi,serial=1,snapshot", "x", {"format": "vdi", "serial": "1", "snapshot": True}),
        ("x,discard=on", "x", {}),
        ("x,discard=ignore", "x", {"discard": "off"}),
        (
            "x,format=qcow2,backing=a,backing=b,,c",
            "x",
            {"format": "qcow2", "backing": ("a", "b,c")},
        ),
        ("x,format=vmdk,data-file=y", "x", {"format": "vmdk", "data_file": "y"}),
        ("x,logical-block-size=4096", "x", {"logical_block_size": 4096}),
        ("x,physical-block-size=512", "x", {"physical_block_size": 512}),
        ("x,bps=10M", "x", {"bps": 10 << 20}),
        ("x,iops=1000,iops-burst=2K", "x", {"iops": 1000, "iops_burst": 2048}),
        ("x,bps=1,burst=9,format=raw", "x", {"bps": 1, "burst": 9, "format": "raw"}),
        ("x,bps=9,burst=9,format=qcow2", "x", {"bps": 9, "burst": 9, "format": "qcow2"}),
    ],
)
def test_what_is_said(text: str, path: str, values: dict[str, object]) -> None:
    drive = Drive.parse(text)
    slots = set(Drive.__slots__) - {"rate", "inside"}
    assert {name: getattr(drive, name) for name in slots} == {
        "path": path, **DEFAULTS, **values,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "--drive: no path; say --drive disk.img"),
        (",readonly", "--drive: no path; say --drive disk.img"),
        (
            "x,read-only",
            "--drive x,read-only: 'read-only' is not one of readonly, snapshot, format=, serial=, "
            "cache=, queues=, werror=, discard=, backing=, data-file=, logical-block-size=, "
            "physical-block-size=, bps=, burst=, iops=, iops-burst=",
        ),
        ("x,", "--drive x,: '' is not one of readonly, "),
        ("x,cache", "--drive x,cache: 'cache' is not one of readonly, "),
        ("x,=y", "--drive x,=y: '=y' is not one of readonly, "),
        ("x,readonly=yes", "--drive x,readonly=yes: readonly=yes is not on or off"),
        ("x,snapshot=1", "--drive x,snapshot=1: snapshot=1 is not on or off"),
        ("x,format=iso", "--drive x: format=iso is not one of raw, qcow2, "),
        ("x,cache=", "--drive x: cache= is not one of writeback, none, unsafe"),
        ("x,cache=directsync", "--drive x: cache=directsync is not one of writeback, none, unsafe"),
        ("x,werror=ignore", "--drive x: werror=ignore is not one of report, stop"),
        ("x,bps=0", "--drive x: bps=0 is no number above 0; say for example 10M"),
        ("x,iops=fast", "--drive x: iops=fast is no number above 0"),
        ("x,iops=9P", "iops=9P is no number above 0"),
        ("x,burst=1M", "--drive x: burst= goes with bps=, which is not given"),
        ("x,bps=1,iops-burst=1", "iops-burst= goes with iops=, which is not given"),
        ("x,bps=9,burst=8,format=qcow2", "with format=qcow2 a burst is a second's worth at least"),
        ("x,queues=0", "--drive x: queues=0 is not from 1 to 16"),
        ("x,queues=17", "--drive x: queues=17 is not from 1 to 16"),
        ("x,queues=-1", "--drive x,queues=-1: queues=-1 is not from 1 to 16"),
        ("x,queues=two", "--drive x,queues=two: queues=two is not from 1 to 16"),
        ("x,queues=", "--drive x,queues=: queues= is not from 1 to 16"),
        ("x,queues=" + "9" * 5000, "--drive x,queues=999"),
        ("x,serial=123456789012345678901", "is not up to 20 ASCII characters"),
        ("x,serial=\u00e9", "is not up to 20 ASCII characters"),
        ("x,serial=a\tb", r"--drive x: serial='a\tb' is not up to 20 ASCII characters"),
        ("x,format=luks", "format=luks: a LUKS volume is a raw disk, which the guest itself"),
        ("x,discard=maybe", "--drive x: discard=maybe is not one of unmap, off"),
        ("x,backing=y", "backing= goes with format=qcow2, qcow, qed or vmdk"),
        ("x,format=vdi,backing=y", "backing= goes with format=qcow2, qcow, qed or vmdk"),
        ("x,format=vdi,data-file=y", "--drive x: data-file= goes with format=qcow2 or vmdk"),
        ("x,backing=", "--drive x,backing=: nothing after backing="),
        ("x,logical-block-size=513", "logical-block-size=513 is not one of 512, 1024, 2048, 4096"),
        ("x,logical-block-size=8192", "logical-block-size=8192 is not one of 512, 1024, 2048"),
        ("x,physical-block-size=4k", "physical-block-size=4k is not one of 512, 1024, 2048, 4096"),
        (
            "x,logical-block-size=4096,physical-block-size=512",
            "physical-block-size=512 is less than logical-block-size=4096",
        ),
    ],
)
def test_what_cannot_be_said(text: str, line: str) -> None:
    with pytest.raises(UsageError) as raised:
        Drive.parse(text)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_path_that_is_none() -> None:
    with pytest.raises(UsageError, match=r"--drive 'a\\x00b' has a NUL character in it"):
        Drive("a\0b")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    return disk


@pytest.mark.parametrize(
    ("words", "readonly", "kind"),
    [("", False, RawImage), (",readonly", True, RawImage), (",snapshot", False, Overlay),
     (",snapshot,readonly", True, RawImage), (",cache=none,snapshot", False, Overlay)],
)  # fmt: skip
def test_opening(path: Path, words: str, readonly: bool, kind: type) -> None:
    before = os.listdir("/proc/self/fd")
    device = Drive.parse(f"{path},serial=S,queues=3{words}").open(7)
    assert isinstance(device, Block)
    assert (device.name, len(device.slots), device.serial) == ("blk7", 3, b"S".ljust(20, b"\0"))
    assert bool(device.features >> blk.F_RO & 1) is readonly
    assert type(device.image) is kind
    device.close()
    assert os.listdir("/proc/self/fd") == before


def test_snapshots_share_an_image(path: Path) -> None:
    devices = [Drive.parse(f"{path},snapshot").open(number) for number in range(2)]
    with pytest.raises(HostError, match="another process uses this image"):
        Drive.parse(str(path)).open(2)
    for device in devices:
        device.close()


def test_a_snapshot_of_a_file_nobody_may_write(path: Path) -> None:
    path.chmod(0o444)
    Drive.parse(f"{path},snapshot").open(0).close()


@pytest.mark.parametrize("words", ["", ",readonly", ",snapshot"])
def test_another_format_has_to_be_said(path: Path, words: str) -> None:
    """A guest can write what it likes at the beginning of a raw disk."""
    path.write_bytes(b"QFI\xfb" + bytes(1020))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(UsageError, match=r"looks like a qcow2 image; say .*,format=qcow2 \(or"):
        Drive.parse(f"{path}{words}").open(0)
    assert os.listdir("/proc/self/fd") == before
    Drive.parse(f"{path},format=raw{words}").open(0).close()


def test_discard_off_is_not_offered(path: Path) -> None:
    """And a driver that asks all the same is told that there is no such request."""
    disk = Drive.parse(f"{path},discard=off").open(0)
    with Driver(disk) as driver:
        assert not driver.features >> blk.F_DISCARD & 1
        assert driver.features >> blk.F_WRITE_ZEROES & 1
        assert driver.read(mmio.CONFIG + 0x38) & 0xFF == 0  # write_zeroes_may_unmap
        out = struct.pack("<QII", 0, 8, 0)
        assert request(driver, blk.T_DISCARD, out=out)[0] == blk.S_UNSUPP
        assert request(driver, blk.T_WRITE_ZEROES, out=out)[0] == blk.S_OK
    disk.close()


@pytest.mark.parametrize(
    ("words", "logical", "exponent"),
    [("", 512, 3), (",logical-block-size=4096", 4096, 0), (",physical-block-size=512", 512, 0),
     (",logical-block-size=1024,physical-block-size=2048", 1024, 1)],
)  # fmt: skip
def test_block_sizes(path: Path, words: str, logical: int, exponent: int) -> None:
    disk = Drive.parse(f"{path}{words}").open(0)
    assert isinstance(disk, Block)
    assert struct.unpack_from("<IB", disk.config, 20) == (logical, exponent)
    assert struct.unpack_from("<Q", disk.config)[0] == path.stat().st_size // 512
    disk.close()
    path.write_bytes(bytes(512 * 9))
    if logical > 512:
        before = os.listdir("/proc/self/fd")
        with pytest.raises(UsageError, match="4608 bytes is not whole blocks of logical-block-si"):
            Drive.parse(f"{path}{words}").open(0)
        assert os.listdir("/proc/self/fd") == before

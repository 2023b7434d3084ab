"""vmm/block/{probe,host_file}.py: marks, and every line about a file that is not what was said."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support import images
from vmm import MachineConfig
from vmm.block.drive import Drive, check_once
from vmm.block.probe import FORMATS, detect
from vmm.errors import HostError, UsageError

MIB = 1 << 20


def found(path: Path) -> str:
    with path.open("rb") as file:
        return detect(file.fileno(), path.stat().st_size)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"QFI\xfb\0\0\0\3", "qcow2"), (b"QFI\xfb\0\0\0\1", "qcow"), (b"KDMV\1\0\0\0", "vmdk"),
        (b"COWD\1\0\0\0", "vmdk"), (b"vhdxfile", "vhdx"), (b"conectix", "vpc"), (b"QED\0", "qed"),
        (b"# Disk DescriptorFile\nversion=1\n", "vmdk"), (b"#x\r\n\r\nversion=3\r\n", "vmdk"),
        (b"WithoutFreeSpace", "parallels"), (b"WithouFreSpacExt", "parallels"),
        (bytes(64) + b"\x7f\x10\xda\xbe", "vdi"), (b"Bochs Virtual HD Image", "bochs"),
        (b"LUKS\xba\xbe\0\1", "raw"), (b"\0" * 8, "raw"), (b"QF", "raw"), (b"", "raw"),
        (b"\xebXMSDOS5", "raw"), (b"version=9\n", "raw"), (b"#!/bin/sh\nversion=\n", "raw"),
        (b"#" * 5000, "raw"), (bytes(512) + b"koly" + bytes(508), "dmg"),
        (bytes(1024) + b"conectix" + bytes(504), "vpc"),
        (bytes(1024) + b"conectix" + bytes(505), "raw"),
    ],
)  # fmt: skip
def test_marks(tmp_path: Path, start: bytes, name: str) -> None:
    file = tmp_path / "disk"
    file.write_bytes(start)
    assert found(file) == name


@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        *((format, ()) for format in images.FORMATS),
        ("vpc", ("-o", "subformat=fixed")),
        ("vmdk", ("-o", "subformat=monolithicFlat")),
        ("vmdk", ("-o", "subformat=streamOptimized")),
        ("qcow2", ("-o", "compat=0.10")),
    ],
)
def test_each_format_is_told_from_raw_and_from_others(
    tmp_path: Path, format: str, options: tuple[str, ...], cache: str
) -> None:
    """Before its size is looked at, and whether it is to be written or not."""
    path = images.make(tmp_path / "a,b.img", format, MIB, *options)
    assert found(path) == format
    before, held = path.read_bytes(), os.listdir("/proc/self/fd")
    value = str(path).replace(",", ",,")
    for words in ("", ",readonly", ",snapshot,serial=1"):
        with pytest.raises(UsageError) as raised:
            Drive.parse(f"{value},cache={cache}{words}").open(0)
        assert f"looks like a {format} image; say {value},format={format} (or" in str(raised.value)
    wrong = next(other for other in FORMATS[1:] if other != format)
    for words in ("", ",serial=1"):
        with pytest.raises(UsageError) as raised:
            Drive.parse(f"{value},format={wrong}{words}").open(0)
        assert f"format={wrong}, but this is a {format} image; say {value},format={format}" in str(
            raised.value
        )
    assert path.read_bytes() == before
    assert os.listdir("/proc/self/fd") == held


def test_raw_is_what_a_person_says_it_is(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"QFI\xfb" + bytes(1020))
    Drive.parse(f"{path},format=raw").open(0).close()
    path.write_bytes(b"LUKS\xba\xbe" + bytes(1018))
    Drive.parse(str(path)).open(0).close()


@pytest.mark.parametrize("format", FORMATS[1:])
def test_a_raw_disk_is_no_image(tmp_path: Path, format: str) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 16))
    line = f"format={format}, but there is no {format} image in it: as a raw disk it is --drive "
    for words in ("", ",readonly", ",serial=1"):
        with pytest.raises(UsageError, match=line) as raised:
            Drive.parse(f"{path},format={format}{words}").open(0)
    said = str(raised.value).rpartition("--drive ")[2]
    Drive.parse(said).open(0).close()


def test_a_format_that_nobody_opens(tmp_path: Path) -> None:
    path = tmp_path / "disk.dmg"
    path.write_bytes(bytes(1024) + b"koly" + bytes(508))
    with pytest.raises(UsageError, match="is a dmg image, which no format= is for; make a raw one"):
        Drive.parse(str(path)).open(0)


@pytest.mark.parametrize("words", ["", ",format=raw", ",format=qcow2", ",format=vdi,serial=1"])
def test_the_hint_for_a_missing_file_makes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """Also where its name means something to a shell. It never names a file that exists."""
    for name in ("a b", "$(x)", "-n", "quote'"):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError, match="no such file; make one: ") as raised:
            Drive.parse(f"{name}{words}").open(0)
        command = str(raised.value).partition("make one: ")[2]
        assert command.startswith(("truncate -s 1G ", "qemu-img create -f "))
        subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
        Drive.parse(f"{name}{words}").open(0).close()
        os.unlink(tmp_path / name)


@pytest.mark.parametrize("words", ["", ",format=qcow2", ",format=qcow2,serial=1"])
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nosuch", "no such file; make one: "),
        ("no/such", "no such file, and no directory {}/no"),
        ("directory", "directory is a directory, not a disk image"),
        ("fifo", "fifo is neither a file nor a block device"),
        ("socket", "socket is neither a file nor a block device"),
        ("device", "device is neither a file nor a block device"),
        ("loop", "Too many levels of symbolic links"),
        ("good/x", "Not a directory"),
        ("n" * 300, "File name too long"),
    ],
)
def test_what_is_no_image_of_any_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: str, words: str
) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "good").write_bytes(bytes(512))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as sock:
        monkeypatch.chdir(tmp_path)
        sock.bind("socket")
        before = os.listdir("/proc/self/fd")
        for more in ("", ",readonly"):
            with pytest.raises(UsageError) as raised:
                Drive.parse(f"{tmp_path}/{name}{words}{more}").open(0)
            assert line.format(tmp_path) in str(raised.value)
            assert "\n" not in str(raised.value) and "truncate" not in str(raised.value).replace(
                "make one: truncate", ""
            )
        assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("words", ["", ",format=qcow2", ",format=qcow2,serial=1"])
def test_a_read_only_file_system(tmp_path: Path, words: str) -> None:
    """The hint, tried: with `readonly` it opens."""
    if os.geteuid():
        pytest.skip("mounts; needs root")
    place = tmp_path / "place"
    place.mkdir()
    if "qcow2" in words:
        images.make(place / "disk", "qcow2", MIB)
    else:
        (place / "disk").write_bytes(bytes(MIB))
    subprocess.run(["mount", "--bind", place, place], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
        with pytest.raises(UsageError, match="Read-only file system; try ") as raised:
            Drive.parse(f"{place}/disk{words}").open(0)
        said = str(raised.value).rpartition("try ")[2]
        Drive.parse(said).open(0).close()
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("words", ["", ",format=qcow2", ",format=qcow2,serial=1"])
def test_an_image_another_program_uses(tmp_path: Path, words: str) -> None:
    """QEMU's programs hold OFD locks; so do we."""
    path = tmp_path / "disk"
    format = "qcow2" if "qcow2" in words else "raw"
    images.make(path, format, MIB)
    with subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={path}",
         "--blockdev", f"driver={format},node-name=d,file=f",
         "--export", f"type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,"
         f"addr.path={tmp_path}/s"]
    ) as daemon:  # fmt: skip
        try:
            while not (tmp_path / "s").exists():
                assert daemon.poll() is None
            for more in ("", ",readonly"):
                with pytest.raises(HostError, match="another process uses this image; end it"):
                    Drive.parse(f"{path}{words}{more}").open(0)
        finally:
            daemon.kill()


def test_readers_may_stay_where_we_only_read(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    reader = Drive.parse(f"{path},readonly").open(0)
    with pytest.raises(HostError) as raised:
        Drive.parse(str(path)).open(1)
    match = re.search(r"end it, or say (.*)", str(raised.value))
    assert match
    Drive.parse(match[1]).open(1).close()
    reader.close()


def test_one_image_twice(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    images.make(path, "qcow2", MIB)
    (tmp_path / "link").symlink_to(path)
    os.link(path, tmp_path / "hard")
    for first, second in (
        ("disk", "disk"), ("disk", "link"), ("hard,readonly", "disk"), ("disk,snapshot", "link"),
        ("disk,format=raw", "link,format=qcow2"),
    ):  # fmt: skip
        drives = [Drive.parse(f"{tmp_path}/{words}") for words in (first, second)]
        with pytest.raises(UsageError, match="give each readonly or snapshot, or one of them a"):
            check_once(drives)
    for first, second in (("disk,readonly", "link,snapshot"), ("nosuch", "nosuch")):
        check_once([Drive.parse(f"{tmp_path}/{words}") for words in (first, second)])


def test_one_image_twice_by_one_name() -> None:
    """Told of without a look at this host."""
    for second in ("x", "./x,format=qcow2", "x,snapshot"):
        with pytest.raises(UsageError, match="two disks that write to one image destroy it"):
            MachineConfig(drives=["x", second])
    MachineConfig(drives=["x,readonly", "x,snapshot", "y"])
    with pytest.raises(UsageError, match="tag=t is given twice"):
        MachineConfig(shares=["/etc,tag=t", "/usr,tag=t"])


@pytest.mark.parametrize("words", ["", ",format=qcow2"])
def test_an_ordinary_user(words: str) -> None:
    """What he may read is offered as `readonly`; what he may not, is not."""
    if os.geteuid():
        pytest.skip("becomes another user; needs root")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        format = words.partition("=")[2] or "raw"
        for file, mode in (("theirs", 0o600), ("shared", 0o644)):
            images.make(Path(name, file), format, MIB).chmod(mode)
        code = (
            "import sys\nfrom vmm.block.drive import Drive\n"
            "for text in sys.argv[1:]:\n"
            "    try: Drive.parse(text).open(0).close(); print('ok')\n"
            "    except Exception as err: print(type(err).__name__, err)\n"
        )
        texts = [
            f"{name}/{file}{words}{more}"
            for file in ("theirs", "shared") for more in ("", ",readonly")
        ]  # fmt: skip
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
             "--inh-caps=-all", "--bounding-set=-all", sys.executable, "-c", code, *texts],
            capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        if "Permission denied" in done.stderr or "No module" in done.stderr:
            pytest.skip("another user cannot read this clone")
        lines = done.stdout.splitlines()
        start = f"UsageError --drive {name}"
        assert lines == [
            f"{start}/theirs: Permission denied; this user may not even read it",
            f"{start}/theirs: Permission denied",
            f"{start}/shared: Permission denied; try {name}/shared{words},readonly",
            "ok",
        ], done.stderr


def test_one_device_twice(tmp_path: Path, loop_device: str) -> None:
    node = tmp_path / "node"
    os.mknod(node, 0o60600, os.stat(loop_device).st_rdev)
    with pytest.raises(UsageError, match=f"{node}: the image of /dev/loop"):
        check_once([Drive.parse(loop_device), Drive.parse(str(node))])

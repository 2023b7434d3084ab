"""vmm/block/{header,layers}.py: an image's header opens nothing that the person has not named."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from pathlib import Path

import pytest

from tests.support import images
from tests.support.virtio_driver import Driver
from tests.test_virtio_blk import request
from vmm.block import header
from vmm.block.drive import Drive
from vmm.block.layers import nodes
from vmm.errors import UsageError
from vmm.virtio import blk

MIB = 1 << 20


def refused(text: str) -> str:
    """What is said of a drive, whichever way it would be served."""
    lines = set()
    for more in ("", ",serial=1", ",readonly"):
        with pytest.raises(UsageError) as raised:
            Drive.parse(text + more).open(0)
        lines.add(str(raised.value))
    assert len(lines) == 1
    line = lines.pop()
    assert "\n" not in line
    return line


def first_sector(text: str) -> bytes:
    """What the guest reads there."""
    disk = Drive.parse(f"{text},serial=1").open(0)
    with Driver(disk) as driver:
        status, data = request(driver, blk.T_IN, 0, into=512)
        assert status == blk.S_OK
    disk.close()
    return data


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base, 1.img"
    path.write_bytes(b"secret".ljust(MIB, b"#"))
    return path


@pytest.mark.parametrize("format", ["qcow2", "qed", "vmdk", "qcow"])
def test_a_backing_file_is_opened_where_it_is_named(
    tmp_path: Path, base: Path, format: str
) -> None:
    below, kind = base, "raw"
    if format == "vmdk":
        below, kind = images.convert(base, tmp_path / "base.vmdk", "vmdk"), "vmdk"
    path = tmp_path / "top"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", format, "-b", below, "-F", kind, path], check=True
    )
    text = f"{path},format={format}"
    line = refused(text)
    assert f"lies over {below}, as its header says; if it may be opened, add backing=" in line
    before = below.read_bytes()
    words = line.partition("add ")[2]
    assert first_sector(f"{text},{words}") == b"secret".ljust(512, b"#")
    disk = Drive.parse(f"{text},{words},serial=1").open(0)
    with Driver(disk) as driver:
        assert request(driver, blk.T_OUT, 0, out=b"x" * 512)[0] == blk.S_OK
    disk.close()
    assert below.read_bytes() == before
    assert first_sector(f"{text},{words}") == b"x" * 512
    assert "has no backing file; leave it out" in refused(f"{text},{words},backing={path}")


def test_a_chain_is_named_link_by_link(tmp_path: Path, base: Path) -> None:
    chain = [base]
    for name in ("middle", "top"):
        path = tmp_path / name
        kind = "raw" if chain[-1] is base else "qcow2"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", chain[-1], "-F", kind, path],
            check=True,
        )
        chain.append(path)
    text = f"{chain[2]},format=qcow2"
    for _ in range(2):
        line = refused(text)
        text += "," + line.partition("add ")[2]
    assert text.count("backing=") == 2
    assert first_sector(text) == b"secret".ljust(512, b"#")
    line = refused(f"{chain[2]},format=qcow2,backing={chain[1]}")
    assert f"its backing file {chain[1]} lies over {base}" in line


def test_a_backing_file_is_not_opened_beyond_its_own_header(tmp_path: Path, base: Path) -> None:
    """Nor is a raw one taken for something else."""
    inner = tmp_path / "inner"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", inner], check=True
    )
    top = tmp_path / "top"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", inner, "-F", "raw", top], check=True
    )
    assert first_sector(f"{top},format=qcow2,backing={inner}")[:4] == b"QFI\xfb"


@pytest.mark.parametrize("name", ["nbd://127.0.0.1:9/x", "json:{}", "file:x", "ssh://a@b/c"])
def test_what_is_on_the_network_is_never_opened(tmp_path: Path, name: str) -> None:
    path = tmp_path / "top"
    subprocess.run(
        ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", path, "1M"],
        check=True,
    )
    line = refused(f"{path},format=qcow2")
    assert f"lies over {name}, as its header says, which is not opened" in line
    path.write_text(f'# Disk DescriptorFile\nversion=1\nRW 128 FLAT "{name}" 0\n'.ljust(1024))
    assert f"keeps its data in {name}, as its header says, which is not opened" in refused(
        f"{path},format=vmdk"
    )


def test_an_external_data_file(tmp_path: Path, base: Path) -> None:
    victim = tmp_path / "victim"
    path = images.make(tmp_path / "top", "qcow2", MIB, "-o", f"data_file={victim},data_file_raw=on")
    victim.write_bytes(b"victim".ljust(MIB, b"."))
    line = refused(f"{path},format=qcow2")
    assert f"keeps its data in {victim}, as its header says; if it may be opened, add " in line
    words = line.partition("add ")[2]
    assert first_sector(f"{path},format=qcow2,{words}") == b"victim".ljust(512, b".")
    path = images.make(tmp_path / "plain", "qcow2", MIB)
    assert "keeps its data itself; leave it out" in refused(
        f"{path},format=qcow2,data-file={victim}"
    )


@pytest.mark.parametrize("kind", ["monolithicFlat", "twoGbMaxExtentSparse"])
def test_extents(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "vm"
    place.mkdir()
    path = images.make(place / "disk.vmdk", "vmdk", MIB, "-o", f"subformat={kind}")
    line = refused(f"{path},format=vmdk")
    words = line.partition("add ")[2]
    assert first_sector(f"{path},format=vmdk,{words}") == bytes(512)
    assert first_sector(f"{path},format=vmdk,data-file={place}") == bytes(512)
    for other in (tmp_path, path):
        assert "keeps its data in" in refused(f"{path},format=vmdk,data-file={other}")
    # A link out of the directory is none of its files.
    extent = next(each for each in place.iterdir() if each != path)
    extent.rename(tmp_path / "away")
    extent.symlink_to(tmp_path / "away")
    assert "keeps its data in" in refused(f"{path},format=vmdk,data-file={place}")


def test_a_descriptor_inside_an_extent_lists_nothing(tmp_path: Path) -> None:
    """A sparse file that says it has no sectors is a descriptor's shell, as QEMU reads it."""
    place = tmp_path / "vm"
    place.mkdir()
    text = b'# Disk DescriptorFile\nversion=1\nRW 128 FLAT "/etc/passwd" 0\n'
    shell = struct.pack("<4sIIQQQQ", b"KDMV", 1, 0, 0, 128, 1, 2).ljust(512, b"\0")
    path = place / "shell.vmdk"
    path.write_bytes(shell + text.ljust(1024, b"\0"))
    assert "keeps its data in /etc/passwd" in refused(f"{path},format=vmdk")
    outer = place / "outer.vmdk"
    outer.write_text('# Disk DescriptorFile\nversion=1\nRW 128 SPARSE "shell.vmdk"\n'.ljust(512))
    assert "is a descriptor of other files" in refused(f"{outer},format=vmdk,data-file={place}")


def test_the_daemon_is_told_to_open_no_more(tmp_path: Path) -> None:
    """So that a header that is changed meanwhile opens nothing either."""
    for format in images.FORMATS:
        path = images.make(tmp_path / format, format, MIB)
        made = nodes(Drive(str(path), format=format))
        assert [each["node-name"] for each in made] == ["file", "disk"]
        layered = format in ("qcow2", "qcow", "qed", "vmdk")
        assert ("backing" in made[1]) is layered and made[1].get("backing") is None


@pytest.mark.parametrize("format", ["qcow2", "qed", "qcow", "vmdk"])
def test_headers_of_noise_end(tmp_path: Path, format: str) -> None:
    """Whatever a header holds, it is read in bounded time, or refused in one line."""
    chance = random.Random(7)
    path = images.make(tmp_path / "x", format, MIB)
    good = path.read_bytes()[:4096].ljust(4096, b"\0")
    for _ in range(300):
        data = bytearray(good)
        for _ in range(chance.randint(1, 30)):
            data[chance.randrange(4, 600)] = chance.randrange(256)
        path.write_bytes(data[: chance.choice((4096, 600, 100, 20))])
        fd = os.open(path, os.O_RDONLY)
        try:
            header.read(fd, format, "x")
        except UsageError as err:
            assert str(err) == f"--drive x: the header of this {format} image is broken"
        finally:
            os.close(fd)


def test_endless_extensions(tmp_path: Path) -> None:
    path = tmp_path / "x"
    head = struct.pack(">4sI", b"QFI\xfb", 3).ljust(100, b"\0") + struct.pack(">I", 104)
    path.write_bytes(head + struct.pack(">II", 1, 0) * 200_000)
    assert "the header of this qcow2 image is broken" in refused(f"{path},format=qcow2")


def test_an_encrypted_image(tmp_path: Path) -> None:
    secret = ("--object", "secret,id=s,data=x", "-o")
    path = images.make(
        tmp_path / "x",
        "qcow2",
        MIB,
        *secret,
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
    )
    assert "this qcow2 image is encrypted, and no option takes its key" in refused(
        f"{path},format=qcow2"
    )

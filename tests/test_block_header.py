"""vmm/block/header.py: no spelling of a VMDK descriptor hides a file from the check that QEMU reads
out of it.

Each case here was once served: the guest read the file.
"""

from __future__ import annotations

import ctypes
import random
import struct
from pathlib import Path

import pytest

from tests.support import images
from vmm.block import header
from vmm.block.drive import Drive
from vmm.errors import UsageError

HEAD = (
    "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
    'createType="monolithicFlat"\n'
)
VICTIM = "/etc/passwd"
KINDS = (b"FLAT", b"SPARSE", b"VMFS", b"VMFSSPARSE", b"SESPARSE")
"""Of the extents that QEMU opens."""
LINE = f'RW 1 FLAT "{VICTIM}" 0\n'


def shell(sector: int, sectors: int) -> bytes:
    """The header of a sparse extent without sectors, whose descriptor is elsewhere in the file."""
    return struct.pack("<4sIIQQQQ", b"KDMV", 1, 0, 0, 128, sector, sectors).ljust(512, b"\0")


SPELLINGS = {
    "over lines": HEAD + f'RW\n1\nFLAT\n"{VICTIM}" 0\n',
    "with a blank line": HEAD + f'RW 1\n\nFLAT "{VICTIM}" 0\n',
    "with a vertical tab": HEAD + f'RW\v1 FLAT "{VICTIM}" 0\n',
    "with a form feed": HEAD + f'RW 1\fFLAT "{VICTIM}" 0\n',
    "with carriage returns": HEAD + f'RW\r1\rFLAT\r"{VICTIM}" 0\r',
    "size and kind together": HEAD + f'RW 1FLAT "{VICTIM}" 0\n',
    "name and offset together": HEAD + f'RW 1 FLAT "{VICTIM}"0\n',
    "with a sign": HEAD + f'RW +1 FLAT "{VICTIM}" 0\n',
    "without a last quote": HEAD + f'RW 1 SPARSE "{VICTIM}\n',
    "after many lines": HEAD + "# x\n" * 40_000 + LINE,
    "version cut by the probe": "# c".ljust(4096 - len("\nversion=1"), "x")
    + "\nversion=12\n"
    + LINE,
}
SHELLS = {
    "no length": shell(1, 0) + (HEAD + LINE).encode(),
    "an offset of more than 64 bits": shell(1 << 55 | 1, 2) + (HEAD + LINE).encode(),
    "not marked as one": shell(1, 2) + LINE.encode(),
}


def refused(path: Path) -> str:
    """What is said of the image, whichever way it would be served."""
    lines = set()
    for more in ("", ",serial=1", ",readonly"):
        with pytest.raises(UsageError) as raised:
            Drive.parse(f"{path},format=vmdk{more}").open(0).close()
        lines.add(str(raised.value))
    (line,) = lines
    return line


@pytest.mark.parametrize("name", [*SPELLINGS, *SHELLS])
def test_no_spelling_hides_an_extent(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.vmdk"
    path.write_bytes(SHELLS.get(name) or SPELLINGS[name].encode())
    with path.open("ab") as file:
        file.truncate(max(2048, file.tell()))
    line = refused(path)
    assert f"keeps its data in {VICTIM}" in line or "header of this vmdk image is broken" in line


@pytest.mark.parametrize("more", ["", ",serial=1"])
def test_words_of_an_image_are_escaped(tmp_path: Path, more: str) -> None:
    """An image names the features that it wants, and the daemon says these names."""
    path = images.make(tmp_path / "x", "qcow2", 1 << 20)
    data = bytearray(path.read_bytes())
    struct.pack_into(">Q", data, 72, 1 << 10)  # an incompatible feature
    name = b"\0\x0a" + b"\x1b]0;title\x07\x1b[31mred".ljust(46, b"\0")
    (at,) = struct.unpack_from(">I", data, 100)
    data[at : at + 64] = struct.pack(">II", 0x6803F857, 48) + name + bytes(8)
    path.write_bytes(data)
    with pytest.raises(UsageError) as raised:
        Drive.parse(f"{path},format=qcow2{more}").open(0)
    assert str(raised.value).isprintable()
    assert r"\x1b]0;title\x07\x1b[31mred" in str(raised.value)


def read_by_qemu(text: bytes) -> list[bytes]:
    """The names that QEMU opens for a descriptor: vmdk_parse_extents in its block/vmdk.c, by the
    same sscanf(3)."""
    libc = ctypes.CDLL(None)
    access, kind = ctypes.create_string_buffer(11), ctypes.create_string_buffer(11)
    name = ctypes.create_string_buffer(512)
    sectors, offset = ctypes.c_int64(), ctypes.c_int64(-1)
    found = []
    for at in (0, *(at + 1 for at, byte in enumerate(text) if byte == 10)):
        if at >= len(text):
            break
        matches = libc.sscanf(
            text[at:] + b"\0",
            b'%10s %ld %10s "%511[^\n\r"]" %ld',
            access,
            ctypes.byref(sectors),
            kind,
            name,
            ctypes.byref(offset),
        )
        if matches >= 4 and access.value == b"RW" and kind.value in KINDS:
            found.append(name.value)
    return found


def test_what_qemu_reads_is_seen(tmp_path: Path) -> None:
    """Random descriptors: each name that QEMU's own scanner finds was found, or the image is
    refused."""
    chance = random.Random(9)
    blanks = [" ", "\t", "\n", "\r", "\v", "\f", "\r\n", "", "  ", '"', "\x85", "\x1c"]
    path = tmp_path / "x"
    accepted = 0
    for _ in range(3000):
        text = "version=1\n"
        for number in range(chance.randint(1, 3)):
            words = [
                chance.choice(("RW", "RW", "RW", "RDONLY", "#", "rw", "")),
                chance.choice(("1", "128", "-1", "0x1", "x")),
                chance.choice(("FLAT", "SPARSE", "VMFS", "ZERO", "FLATFLATFLAT")),
                chance.choice((f'"/file{number}"', f'"/file{number}', f"/file{number}", '""')),
                chance.choice(("0", "", "x")),
            ]
            text += chance.choice(("", "", " ", "\t", "\v"))
            for word in words:
                usual = " " if chance.random() < 0.85 else chance.choice(blanks)
                text += word + usual
            text += "\n" if chance.random() < 0.9 else chance.choice(blanks)
        data = text.encode("latin-1")
        path.write_bytes(data)
        with path.open("rb") as file:
            try:
                seen = {name for _, name in header.read(file.fileno(), "vmdk", "x").extents}
            except UsageError:
                continue
        opened = {name.decode() for name in read_by_qemu(data)}
        accepted += bool(opened)
        assert opened <= seen, data
    assert accepted > 30

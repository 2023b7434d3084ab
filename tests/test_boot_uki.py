"""vmm/boot/uki.py: the parts of unified kernel images, made here and hostile ones."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from tests.support.boot_files import CODE, LINUX_NOTE, bzimage, elf, pack
from vmm.boot.loader import extract_vmlinux, load
from vmm.errors import BootError
from vmm.initramfs import Initramfs
from vmm.layout import CMDLINE, MIB
from vmm.memory import GuestMemory

LINUX = elf(notes=LINUX_NOTE)
KERNEL = bzimage(pack(LINUX, "gzip"))


def cpio(name: str) -> bytes:
    ram = Initramfs()
    ram.file(name, data="x")
    return ram.bytes()


def image(sections: dict[str, bytes]) -> bytes:
    """A PE file with `sections`, each at a multiple of 512 bytes, as ukify lays it out."""
    headers = b"MZ" + bytes(0x3A) + struct.pack("<I", 0x40)
    headers += struct.pack("<4sHHIIIHH", b"PE\0\0", 0x8664, len(sections), 0, 0, 0, 112, 0x22)
    headers += struct.pack("<H", 0x20B) + bytes(110)
    offset = 0x1000
    table = contents = b""
    for name, data in sections.items():
        raw = data + bytes(-len(data) % 512)
        where = offset + len(contents)
        table += struct.pack(
            "<8sIIII16x", name.encode(), len(data), 0x10000 + where, len(raw), where
        )
        contents += raw
    return (headers + table).ljust(offset, b"\0") + contents


def test_it_starts_with_all_its_parts(tmp_path: Path) -> None:
    path, mine = tmp_path / "k.efi", tmp_path / "i"
    mine.write_bytes(cpio("mine"))
    parts = {
        ".text": b"\xcc" * 700,
        ".cmdline": b"root=/dev/vda  quiet\n -- lost\0more",
        ".linux": KERNEL,
        ".initrd": cpio("theirs"),
        ".ucode": cpio("microcode"),
    }
    path.write_bytes(image(parts))
    assert extract_vmlinux(str(path)) == LINUX
    for mode in ("auto", "bzimage"):
        with GuestMemory(64 * MIB) as memory:
            state = load(memory, str(path), [str(mine)], "console=ttyS0 single -- a", mode=mode)
            line = b"root=/dev/vda quiet console=ttyS0 single -- a\0"
            assert memory.read(CMDLINE, len(line)) == line
            gpa, size = struct.unpack("<II", memory.read(state.rsi + 0x218, 8))
            ram = memory.read(gpa, size)
            assert ram.index(b"microcode") < ram.index(b"theirs") < ram.index(b"mine")
            if mode == "auto":
                assert memory.read(state.rip, len(CODE)) == CODE
        assert "unified kernel image" in state.description
        assert state.is_linux


def test_a_kernel_alone(tmp_path: Path) -> None:
    path = tmp_path / "k.efi"
    path.write_bytes(image({".linux": KERNEL}))
    with GuestMemory(64 * MIB) as memory:
        state = load(memory, str(path), [], "")
        assert memory.read(state.rip, len(CODE)) == CODE


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (image({".text": b"x"}), "is a program for UEFI or Windows"),
        (image({".linux": b"hello\n" * 300}), r"\.linux of kernel \S+ is a text file"),
        (image({".linux": KERNEL})[:-1024], "is truncated: its section .linux ends past its end"),
        (image({".linux": KERNEL, ".initrd": b"text\n" * 99}), r"\.initrd of kernel .* text file"),
    ],
    ids=["no kernel", "text", "cut", "initrd"],
)
def test_others(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "k.efi"
    path.write_bytes(data)
    with GuestMemory(64 * MIB) as memory, pytest.raises(BootError, match=says):
        load(memory, str(path), [], "")


def test_fuzzed_headers_raise_boot_errors_only(tmp_path: Path) -> None:
    chance, path = random.Random(8), tmp_path / "k.efi"
    whole = image({".linux": KERNEL, ".initrd": cpio("a"), ".cmdline": b"quiet"})
    with GuestMemory(64 * MIB) as memory:
        for _ in range(300):
            data = bytearray(whole)
            for _ in range(chance.randrange(1, 6)):
                data[chance.randrange(0x40, 0x150)] = chance.randrange(256)
            path.write_bytes(data[: chance.choice((len(data), 0x40, 0x60, 0x1000))])
            try:
                load(memory, str(path), [], "")
            except BootError as err:
                assert "\n" not in str(err)

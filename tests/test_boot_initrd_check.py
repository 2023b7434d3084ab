"""vmm/boot/initrd_check.py: what Linux takes as an initrd passes, what it cannot is told."""

from __future__ import annotations

import gzip
import lzma
import os
from pathlib import Path

import pytest

from tests.support.boot_files import LINUX_NOTE, bzimage, elf, pack
from vmm.boot.loader import load
from vmm.errors import BootError
from vmm.initramfs import Initramfs
from vmm.layout import MIB
from vmm.memory import GuestMemory

LINUX = elf(notes=LINUX_NOTE)


@pytest.fixture(scope="module")
def archive() -> bytes:
    ram = Initramfs()
    ram.file("init", data="#!/bin/sh\n", mode=0o755)
    ram.file("noise", data=os.urandom(100_000))
    return ram.bytes()


def boot(directory: Path, initrd: bytes, kernel: bytes = LINUX) -> None:
    path, file = directory / "k", directory / "initrd"
    path.write_bytes(kernel)
    file.write_bytes(initrd)
    with GuestMemory(64 * MIB) as memory:
        load(memory, str(path), [str(file)], "")


@pytest.mark.parametrize("kind", ["gzip", "xz", "lzma", "bzip2", "zstd", "lz4", None])
def test_archives(tmp_path: Path, archive: bytes, kind: str | None) -> None:
    boot(tmp_path, pack(archive, kind) if kind else archive)


def test_several_in_one_file(tmp_path: Path, archive: bytes) -> None:
    """As of microcode: an archive that is not packed, zeroes, and a packed one."""
    boot(tmp_path, archive + bytes(1024) + gzip.compress(archive))
    boot(tmp_path, bytes(512) + archive)
    boot(tmp_path, gzip.compress(archive) + bytes(3) + gzip.compress(archive))


def test_images_for_dev_ram(tmp_path: Path, archive: bytes) -> None:
    ext = bytearray(1 << 17)
    ext[0x438:0x43A] = b"\x53\xef"
    ext[0x10] = 1
    boot(tmp_path, bytes(ext))
    boot(tmp_path, b"hsqs" + os.urandom(1 << 16))
    boot(tmp_path, b"\x01\x02\x03\x04unknown\xff" * 100)


WRONG = {
    "program": (elf(), "is an ELF file"),
    "bzImage": (bzimage(), r"is a kernel \(bzImage\), not an initrd"),
    "PE": (b"MZ" + bytes(5000), "is a program for UEFI or Windows"),
    "text": (b"hello\n", "is a text file, not an initrd; Linux takes a cpio archive"),
    "script": (b"#!/bin/sh\n", "is a script"),
    "qcow2": (b"QFI\xfb" + bytes(1000), r"is a disk image \(qcow2\), .* give it with --drive"),
    "ISO": (b"\1" * 0x8001 + b"CD001", r"is a CD image \(ISO 9660\), .* give it with --drive"),
    "disk": (b"\1" * 510 + b"\x55\xaa" + b"\1" * 512, "is a disk image or boot sector"),
    "tar": (b"a" * 257 + b"ustar" + bytes(1000), "is a tar archive"),
    "old cpio": (b"070707" + b"0" * 1000, "in an old format, .* -H newc"),
    "binary cpio": (b"\xc7\x71" + b"\1" * 1000, "in an old format"),
    "lz4 frame": (b"\x04\x22\x4d\x18" + b"\1" * 1000, "lz4 -l"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kernel", ["vmlinux", "bzImage"])
def test_other_files(tmp_path: Path, wrong: str, kernel: str) -> None:
    data, says = WRONG[wrong]
    with pytest.raises(BootError, match=says) as caught:
        boot(tmp_path, data, LINUX if kernel == "vmlinux" else bzimage(pack(LINUX, "gzip")))
    assert str(caught.value).startswith(f"--initrd {tmp_path / 'initrd'} is ")


def test_cut_short(tmp_path: Path, archive: bytes) -> None:
    packed = gzip.compress(archive)
    half = packed[: len(packed) // 2]
    for data in (packed[:20], half, packed[:-1], lzma.compress(archive)[:-20]):
        with pytest.raises(BootError, match=r"cannot be unpacked: its (gzip|xz) data .* end early"):
            boot(tmp_path, data)
    broken = bytearray(packed)
    broken[1000:1100] = bytes(100)
    with pytest.raises(BootError, match="its gzip data are broken"):
        boot(tmp_path, bytes(broken))


def test_other_kernels_take_what_they_like(tmp_path: Path) -> None:
    boot(tmp_path, b"hello\n", elf())

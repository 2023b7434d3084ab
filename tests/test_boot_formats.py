"""vmm.boot.formats: each wrong kernel has its own message."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pytest

from tests.support.boot_files import bzimage, elf, pack
from vmm.boot.file import InputFile
from vmm.boot.formats import BZIMAGE, ELF, identify
from vmm.errors import BootError
from vmm.initramfs import Initramfs


def identified(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with InputFile(str(path), "kernel") as file:
        return identify(file)


def cpio(path: Path) -> bytes:
    archive = Initramfs()
    archive.file("init", data="#!/bin/sh\n", mode=0o755)
    archive.write(path)
    return path.read_bytes()


def arm64_image() -> bytes:
    return b"MZ" + bytes(0x36) + b"ARM\x64" + bytes(4000)


def disk() -> bytes:
    return b"\xeb\x63\x90" + bytes(0x1FB) + b"\x55\xaa" + bytes(512)


def test_kernels(tmp_path: Path) -> None:
    assert identified(tmp_path / "k", bzimage()) == BZIMAGE
    assert identified(tmp_path / "k", elf()) == ELF


WRONG = [
    ("arm64", arm64_image(), "is a kernel Image for arm64"),
    ("riscv", b"MZ" + bytes(0x36) + b"RSC\x05" + bytes(4000), "is a kernel Image for RISC-V"),
    ("arm64.gz", gzip.compress(arm64_image()), "gzip data, and what is in it is a kernel Image"),
    ("PE", b"MZ" + bytes(5000), r"is a program for UEFI or Windows \(PE\) without a Linux kernel"),
    ("zboot", b"MZ\0\0zimg" + bytes(5000), "is an EFI zboot image"),
    ("cut", bzimage()[:0x200], "is truncated: it starts like a bzImage"),
    ("cut early", bzimage()[:40], "is truncated: it starts like a bzImage"),
    ("uImage", b"\x27\x05\x19\x56" + bytes(100), "is a U-Boot uImage"),
    ("FIT", b"\xd0\x0d\xfe\xed" + bytes(100), "is a device tree or FIT image"),
    ("ELF.gz", gzip.compress(elf()), "is an ELF file packed with gzip; unpack it first"),
    ("bz2", bz2.compress(b"some text"), "is bzip2 data"),
    ("xz", lzma.compress(b"\0" * 1000), "is xz data"),
    ("broken gz", b"\x1f\x8b\x08" + bytes(50), "is gzip data: an initrd goes to --initrd"),
    ("deb", b"!<arch>\ndebian-binary", r"is a package \(Debian\); unpack it \(dpkg -x"),
    ("qcow2", b"QFI\xfb" + bytes(100), "is a disk image"),
    ("disk", disk(), "is a boot sector or disk image"),
    ("script", b"#!/bin/sh\necho hello\n", "is a script"),
    ("text", b"Hello, world.\n" * 100, "is a text file"),
    ("zeroes", bytes(8192), "is all zeroes"),
    ("one byte", b"\0", "is all zeroes"),
    ("noise", b"\xde\xad\xbe\xef" * 300, "is not a kernel this can boot"),
]


@pytest.mark.parametrize(("data", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_kernels(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "k"
    with pytest.raises(BootError, match=message) as caught:
        identified(path, data)
    assert str(caught.value).startswith(f"kernel {path} is ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [None, "gzip", "xz", "bzip2", "lzma", "zstd", "lz4"])
def test_an_initrd_as_the_kernel(tmp_path: Path, kind: str | None) -> None:
    data = cpio(tmp_path / "cpio")
    if kind in ("zstd", "lz4"):
        pytest.importorskip({"zstd": "zstandard", "lz4": "lz4.block"}[kind])
    with pytest.raises(BootError, match=r"is an initrd \(a .*give it with --initrd"):
        identified(tmp_path / "k", pack(data, kind) if kind else data)

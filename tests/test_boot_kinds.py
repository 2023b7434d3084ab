"""vmm/boot/kinds.py: files of many formats given as a kernel: what each is, and what works."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support import images
from vmm.boot import kinds
from vmm.boot.loader import load
from vmm.errors import BootError
from vmm.layout import MIB
from vmm.memory import GuestMemory


def at(offset: int, magic: bytes, size: int = 1 << 17) -> bytes:
    data = bytearray(b"\x01" * size)
    data[offset : offset + len(magic)] = magic
    return bytes(data)


def firmware(reset: bytes) -> bytes:
    return at((1 << 17) - 16, reset)


MARKED = [
    *((at(offset, magic), what) for offset, magic, what in kinds._MAGICS),
    (firmware(b"\xea\x5b\xe0\x00\xf0"), "firmware (a BIOS or UEFI)"),
    (firmware(b"\x90\x90\xe9\x00\x00"), "firmware (a BIOS or UEFI)"),
]


@pytest.mark.parametrize(
    ("data", "what"), MARKED, ids=[f"{n} {w[1]}" for n, w in enumerate(MARKED)]
)
def test_a_marked_file_as_the_kernel(tmp_path: Path, data: bytes, what: str) -> None:
    path = tmp_path / "k"
    path.write_bytes(data)
    with GuestMemory(16 * MIB) as memory, pytest.raises(BootError) as caught:
        load(memory, str(path), [], "")
    line = str(caught.value)
    assert line.startswith(f"kernel {path} is {what}; ")
    assert "bzImage" in line or "vmlinuz" in line
    assert "\n" not in line


@pytest.mark.parametrize("kind", ["qcow2", "vdi", "vmdk", "vpc", "vhdx", "qed", "luks"])
def test_images_that_qemu_makes(tmp_path: Path, kind: str) -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("needs qemu-img")
    path = tmp_path / "image"
    options = ["--object", "secret,id=s,data=x", "-o", "key-secret=s,iter-time=10"]
    images.make(path, kind, 8 * MIB, *(options if kind == "luks" else []))
    with GuestMemory(16 * MIB) as memory, pytest.raises(BootError, match="give it with --drive"):
        load(memory, str(path), [], "")

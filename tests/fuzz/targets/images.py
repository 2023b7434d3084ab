"""Disk images: the mark, what the header names, the file system in one."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress

from tests.fuzz.target import Target, as_file
from vmm.agent import root
from vmm.block import header, probe
from vmm.errors import UsageError


def image() -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        with as_file(data) as path:
            fd = os.open(path, os.O_RDONLY)
            try:
                format = probe.detect(fd, len(data))
                probe.compression(fd)
                for kind in {format, *probe.LAYERED}:
                    with suppress(UsageError):
                        header.read(fd, kind, "input")
            finally:
                os.close(fd)
            with suppress(UsageError):
                kind = root.file_system(path)
                root.size_told(kind, data[: root.HEAD])

    return run


def seeds() -> list[bytes]:
    qcow2 = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0x200, 8, 16, 1 << 20, 0, 1, 0x30000,
                        0x10000, 1, 0, 0)  # fmt: skip
    qcow2 += struct.pack(">QQQII", 4, 0, 0, 4, 104)
    qcow2 += struct.pack(">II", header.EXT_BACKING_FORMAT, 5) + b"qcow2\0\0\0"
    qcow2 += struct.pack(">II", header.EXT_DATA_FILE, 6) + b"data.x\0\0" + bytes(8)
    qcow2 = qcow2.ljust(0x200, b"\0") + b"base.img"
    qcow = struct.pack(">4sIQIIQBBHIQ", b"QFI\xfb", 1, 0x40, 4, 0, 1 << 20, 12, 9, 0, 0, 0)
    qcow = qcow.ljust(0x40, b"\0") + b"base"
    qed = struct.pack("<4sIII5QII", b"QED\0", 65536, 4, 1, 1, 0, 0, 0x10000, 1 << 20, 0x200, 4)
    qed = qed.ljust(0x200, b"\0") + b"base"
    descriptor = (
        b"# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n"
        b'createType="monolithicFlat"\nparentFileNameHint="base.vmdk"\n\n'
        b'RW 2048 FLAT "disk-flat.vmdk" 0\nRW 16 ZERO\nRDONLY 1 SPARSE "a b.vmdk"\n'
    )
    sparse = struct.pack("<4sIIQQQQ", b"KDMV", 1, 3, 0, 128, 1, 2).ljust(512, b"\0") + descriptor
    ext4 = bytearray(0x500)
    ext4[0x438:0x43A] = b"\x53\xef"
    return [
        qcow2, qcow, qed, descriptor, sparse, bytes(ext4), b"vhdxfile", b"XFSB" + bytes(300),
        bytes(512) + b"conectix".ljust(512, b"\0"), b"hsqs" + bytes(100), b"\x1f\x8b\x08",
    ]  # fmt: skip


TARGETS = (
    Target("image", image, seeds, ("vmm.block.header", "vmm.block.probe", "vmm.agent.root")),
)

"""Which format an image file has, by its own mark.

A raw disk has no mark: what stands in its sectors is the guest's. So a mark makes nobody open a
file in that format; it only has the person asked to name the format (`format=`).
"""

from __future__ import annotations

import os

FORMATS = ("raw", "qcow2", "vmdk", "vhdx", "vdi", "vpc", "qed", "parallels", "qcow")
"""All but the first by qemu-storage-daemon."""
LAYERED = ("qcow2", "qcow", "qed", "vmdk")
"""Formats whose images may have a backing file."""
MARKS = (
    (0, b"QFI\xfb\0\0\0\1", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
)
"""(offset, bytes there, format). LUKS is not among them: a LUKS volume is a raw disk."""
FOOTERS = ((b"conectix", "vpc"), (b"koly", "dmg"))
"""(bytes, format): marks in the last 512 bytes, the only ones of a VHD of fixed size."""
FOOTER_BYTES = 512
HEAD_BYTES = 4096
"""Bytes that are looked at; a VMDK descriptor's first lines are in them."""
COMPRESSED = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh", "bzip2"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PK\3\4", "zip"),
)


def readable(fd: int) -> int:
    """Another descriptor of the open file `fd`, for reads of any size and place (`fd` itself may
    be one with O_DIRECT); its owner closes it. Raises OSError."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def detect(fd: int, size: int) -> str:
    """The format of the open file `fd` of `size` bytes; `raw` where it has no mark. Raises
    OSError."""
    fd = readable(fd)
    try:
        return _detect(fd, size)
    finally:
        os.close(fd)


def _detect(fd: int, size: int) -> str:
    head = os.pread(fd, HEAD_BYTES, 0)
    for offset, mark, name in MARKS:
        if head.startswith(mark, offset):
            return name
    if is_descriptor(head):
        return "vmdk"
    if size >= FOOTER_BYTES:
        foot = os.pread(fd, FOOTER_BYTES, size - FOOTER_BYTES)
        for mark, name in FOOTERS:
            if foot.startswith(mark):
                return name
    return "raw"


def is_descriptor(head: bytes) -> bool:
    """Whether a text that begins with `head` is a VMDK descriptor, as QEMU's block/vmdk.c tells
    one: its first line that is neither empty nor a comment is its version."""
    if head.lower().startswith(b"# disk descriptorfile"):
        return True
    for line in head.split(b"\n"):
        line = line.rstrip(b"\r")
        if line.strip(b" ") and not line.startswith(b"#"):
            return line in (b"version=1", b"version=2", b"version=3")
    return False


def compression(fd: int) -> str:
    """The program that compressed the open file `fd`; empty: none that is known."""
    fd = readable(fd)
    try:
        head = os.pread(fd, 8, 0)
    finally:
        os.close(fd)
    return next((name for mark, name in COMPRESSED if head.startswith(mark)), "")

"""Files that a guest is started from: kernels, initrds, their packed data, what is in them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
from collections.abc import Callable
from contextlib import suppress

from tests.fuzz.source import Source
from tests.fuzz.target import Target, as_file, scratch
from tests.support.boot_files import CODE, LINUX_NOTE, MIB, bzimage, elf, pvh_note
from vmm.boot import decompress, extract_vmlinux, kconfig, load
from vmm.boot.file import InputFile
from vmm.boot.initrd_check import check
from vmm.errors import BootError, UsageError
from vmm.initramfs import Initramfs
from vmm.initramfs.modules import Module
from vmm.memory import GuestMemory

MODES = ("auto", "bzimage", "elf64", "pvh")
UNPACKED = 64 << 20
"""Bytes that an input may unpack to here."""


def kernel() -> Callable[[bytes], None]:
    """The last byte picks how it is started."""
    memory = GuestMemory(32 * MIB)

    def run(data: bytes) -> None:
        how = data[-1] if data else 0
        with as_file(data) as path:
            with suppress(UsageError):
                load(memory, path, [b"070701" * 20], "console=ttyS0", mode=MODES[how & 3])
            if how & 4:
                with suppress(UsageError):
                    extract_vmlinux(path)
            if how & 8:
                file = kconfig.KernelFile(path)
                with suppress(UsageError):
                    assert isinstance(file.release, str)
                with suppress(UsageError):
                    file.config()
                    file.names("virtio_blk")

    return run


def uki(kernel: bytes) -> bytes:
    """A unified kernel image around `kernel`."""
    parts = {".linux": kernel, ".cmdline": b"quiet\0", ".initrd": b"070701" * 20}
    head = b"MZ" + bytes(0x3A) + struct.pack("<I", 64)
    coff = b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, len(parts), 0, 0, 0, 0, 0)
    at, table, body = 64 + len(coff) + 40 * len(parts), b"", b""
    for name, data in parts.items():
        table += name.encode().ljust(8, b"\0")
        table += struct.pack("<IIIIIIHHI", len(data), 0, len(data), at, 0, 0, 0, 0, 0)
        at += len(data)
        body += data
    return head + coff + table + body


def kernel_seeds() -> list[bytes]:
    linux = elf(notes=LINUX_NOTE + pvh_note(MIB + 1))
    ikconfig = b"IKCFG_ST" + gzip.compress(b"CONFIG_SMP=y\n") + b"IKCFG_ED"
    banner = b"Linux version 6.1.0 (x)\0" + bytes(200)
    return [
        linux,
        elf(notes=pvh_note(MIB), bits=32),
        elf(((MIB, CODE, 4096), (2 * MIB, CODE, 8192)), entry=2 * MIB),
        bzimage(gzip.compress(linux)),
        bzimage(lzma.compress(linux)),
        bzimage(bz2.compress(linux)),
        uki(bzimage(gzip.compress(linux))),
        uki(elf(notes=LINUX_NOTE)),
        elf(((MIB, CODE + banner + ikconfig, 4096),), notes=LINUX_NOTE) + b"\x0c",
    ]


def initrd() -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        with as_file(data) as path, suppress(BootError), InputFile(path, "--initrd") as file:
            check(file)

    return run


def initrd_seeds() -> list[bytes]:
    archive = Initramfs().file("init", b"#!/bin/sh\n", mode=0o755).bytes()
    return [
        archive, gzip.compress(archive), lzma.compress(archive), bz2.compress(archive),
        lzma.compress(archive, lzma.FORMAT_ALONE), bytes(512) + archive, b"#!/bin/sh\n",
    ]  # fmt: skip


def packed() -> Callable[[bytes], None]:
    """The first byte is the format's."""
    kinds = [kind for _, kind in decompress.MAGICS]

    def run(data: bytes) -> None:
        source = Source(data)
        kind = source.choice(kinds)
        total = 0
        with suppress(BootError):
            for block in decompress.blocks(source.rest(), kind):
                assert 0 < len(block) <= decompress.BLOCK
                total += len(block)
                if total > UNPACKED:
                    break

    return run


def packed_seeds() -> list[bytes]:
    text = b"a kernel, or nearly " * 50
    kinds = [kind for _, kind in decompress.MAGICS]
    found = {
        "gzip": gzip.compress(text),
        "xz": lzma.compress(text),
        "lzma": lzma.compress(text, lzma.FORMAT_ALONE),
        "bzip2": bz2.compress(text),
    }
    with suppress(ImportError):
        from lz4.block import compress

        block = compress(text, store_size=False)
        size = struct.pack("<I", len(text))
        found["lz4"] = decompress.LZ4_LEGACY_MAGIC + struct.pack("<I", len(block)) + block + size
    with suppress(ImportError):
        import zstandard

        found["zstd"] = zstandard.ZstdCompressor(write_checksum=True).compress(text)
    return [bytes([kinds.index(kind)]) + data for kind, data in found.items()]


def symbols() -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        kconfig.parse(data)
        kconfig.embedded(data)

    return run


def symbols_seeds() -> list[bytes]:
    text = b'CONFIG_SMP=y\n# CONFIG_X is not set\nCONFIG_A="b"\n'
    return [text, b"IKCFG_ST" + gzip.compress(text) + b"IKCFG_ED"]


def module() -> Callable[[bytes], None]:
    """A kernel module: the first byte says how its file's name ends."""
    directory = scratch()
    ends = (".ko", ".ko.xz", ".ko.gz", ".ko.zst")

    def run(data: bytes) -> None:
        end = ends[data[0] % len(ends)] if data else ends[0]
        path = os.path.join(directory, f"m{end}")
        with open(path, "wb") as out:
            out.write(data[1:])
        found = Module("m", path, "m.ko")
        with suppress(UsageError):
            found.info("depends")
            assert isinstance(found.release, str)

    return run


def module_seeds() -> list[bytes]:
    info = b"depends=a,b\0vermagic=6.1.0 SMP\0"
    names = b"\0.modinfo\0.shstrtab\0"
    at = 64 + len(info) + len(names)
    head = b"\x7fELF\2\1\1".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, at, 0, 64, 0, 0, 64, 3, 2)
    sections = [(0, 0, 0, 0), (1, 1, 64, len(info)), (10, 3, 64 + len(info), len(names))]
    table = b"".join(
        struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, size, 0, 0, 1, 0)
        for name, kind, offset, size in sections
    )
    elf = head + info + names + table
    return [b"\0" + elf, b"\1" + lzma.compress(elf), b"\2" + gzip.compress(elf), b"\3" + elf]


TARGETS = (
    Target("kernel", kernel, kernel_seeds,
           ("vmm.boot.elf", "vmm.boot.bzimage", "vmm.boot.uki", "vmm.boot.loader",
            "vmm.boot.formats", "vmm.boot.kconfig", "vmm.boot.source", "vmm.boot.file")),
    Target("initrd", initrd, initrd_seeds, ("vmm.boot.initrd_check", "vmm.boot.kinds")),
    Target("packed", packed, packed_seeds, ("vmm.boot.decompress",)),
    Target("module", module, module_seeds, ("vmm.initramfs.modules",)),
    Target("kconfig", symbols, symbols_seeds, ("vmm.boot.kconfig",)),
)  # fmt: skip

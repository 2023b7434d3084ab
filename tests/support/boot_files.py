"""Small kernels for the boot tests, made byte by byte: ELF files and bzImages."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence

import pytest

PT_LOAD, PT_NOTE = 1, 4
CODE = b"\xb0\x2a\xe6\xf4\xf4"  # mov al, 42; out 0xf4, al; hlt: the same in 32 and 64 bits
MIB = 1 << 20


def note(name: bytes, kind: int, desc: bytes, align: int = 4) -> bytes:
    """One ELF note."""
    data = struct.pack("<III", len(name), len(desc), kind) + name
    data += bytes(-len(data) % align) + desc
    return data + bytes(-len(data) % align)


def pvh_note(entry: int) -> bytes:
    return note(b"Xen\0", 18, struct.pack("<I", entry))


LINUX_NOTE = note(b"Linux\0", 0x100, b"\0\0\0\0")


def elf(
    segments: Sequence[tuple[int, bytes, int]] = ((MIB, CODE, 4096),),
    *,
    entry: int = MIB,
    notes: bytes = b"",
    note_align: int = 4,
    bits: int = 64,
    machine: int | None = None,
    kind: int = 2,
) -> bytes:
    """An ELF executable; `segments` are (GPA, bytes, size in memory)."""
    parts = [(PT_LOAD, gpa, data, size, 4096) for gpa, data, size in segments]
    if notes:
        parts.append((PT_NOTE, 0, notes, len(notes), note_align))
    ehdr, phdr = (64, 56) if bits == 64 else (52, 32)
    offset = ehdr + phdr * len(parts)
    headers = contents = b""
    for part_kind, gpa, data, size, align in parts:
        pad = -(offset + len(contents)) % 16
        contents += bytes(pad)
        at = offset + len(contents)
        if bits == 64:
            headers += struct.pack("<IIQQQQQQ", part_kind, 7, at, 0, gpa, len(data), size, align)
        else:
            headers += struct.pack("<8I", part_kind, at, 0, gpa, len(data), size, 7, align)
        contents += data
    if machine is None:
        machine = 62 if bits == 64 else 3
    ident = b"\x7fELF" + bytes((2 if bits == 64 else 1, 1, 1)) + bytes(9)
    layout = "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH"
    head = struct.pack(layout, kind, machine, 1, entry, ehdr, 0, 0, ehdr, phdr, len(parts), 0, 0, 0)
    return ident + head + headers + contents


def bzimage(payload: bytes = b"", *, setup_sects: int = 4, **fields: int) -> bytes:
    """A bzImage of boot protocol 2.15 around `payload`; `fields` replace those of its header."""
    values = {
        "version": 0x020F,
        "loadflags": 1,
        "initrd_addr_max": 0x7FFFFFFF,
        "kernel_alignment": 0x200000,
        "relocatable_kernel": 1,
        "xloadflags": 1,
        "cmdline_size": 2047,
        "payload_offset": 0x400,
        "payload_length": len(payload),
        "pref_address": 0x1000000,
        "init_size": 4 * MIB,
    } | fields
    kernel = bytearray(0x400) + payload
    kernel[0x200 : 0x200 + len(CODE)] = CODE
    kernel += bytes(-len(kernel) % 16)
    setup = bytearray((setup_sects + 1) * 512)
    setup[:2] = b"MZ"
    setup[0x1F1] = setup_sects
    struct.pack_into("<I", setup, 0x1F4, len(kernel) // 16)
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    setup[0x200:0x206] = b"\xeb\x6aHdrS"
    for name, value in values.items():
        form, offset = _FIELDS[name]
        struct.pack_into(form, setup, offset, value)
    return bytes(setup + kernel)


_FIELDS = {
    "version": ("<H", 0x206),
    "loadflags": ("<B", 0x211),
    "initrd_addr_max": ("<I", 0x22C),
    "kernel_alignment": ("<I", 0x230),
    "relocatable_kernel": ("<B", 0x234),
    "xloadflags": ("<H", 0x236),
    "cmdline_size": ("<I", 0x238),
    "payload_offset": ("<I", 0x248),
    "payload_length": ("<I", 0x24C),
    "pref_address": ("<Q", 0x258),
    "init_size": ("<I", 0x260),
}

# As scripts/Makefile.lib and lib/xz_wrap.sh of Linux call them.
PACKERS = {
    "gzip": "gzip -n -f -9",
    "xz": "xz --check=crc32 --x86 --lzma2=dict=32MiB",
    "lzma": "lzma -9",
    "bzip2": "bzip2 -9",
    "zstd": "zstd -q -22 --ultra",
    "lz4": "lz4 -l -9",
    "lzo": "lzop -9",
}


def pack(data: bytes, kind: str) -> bytes:
    """`data` packed as Linux packs its payload: the tool, then the unpacked size (not for gzip)."""
    command = PACKERS[kind].split()
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([*command, "-c"], input=data, stdout=subprocess.PIPE, check=True)
    size = b"" if kind == "gzip" else struct.pack("<I", len(data))
    return done.stdout + size

"""vmm.boot.elf: what an ELF kernel says, and what is not believed."""

from __future__ import annotations

import random
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tests.support.boot_files import CODE, LINUX_NOTE, MIB, elf, note, pvh_note
from vmm import layout
from vmm.boot.elf import NOTES_MAX, Elf
from vmm.boot.file import InputFile
from vmm.boot.loader import load
from vmm.boot.source import FileSource, PayloadSource
from vmm.errors import BootError
from vmm.memory import GuestMemory
from vmm.testing.kernels import Kernel


def loaded(path: Path, data: bytes, memory: GuestMemory) -> Elf:
    path.write_bytes(data)
    with InputFile(str(path), "kernel") as file:
        parsed = Elf(FileSource(file))
        parsed.check_place()
        parsed.load(memory)
        return parsed


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(BootError) as caught, InputFile(str(path), "kernel") as file:
        Elf(FileSource(file)).check_place()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("bits", [32, 64])
def test_loads_segments_to_their_physical_addresses(tmp_path: Path, bits: int) -> None:
    segments = [(MIB, CODE, 4096), (2 * MIB, b"data" * 100, 400), (3 * MIB, b"", 8192)]
    with GuestMemory(8 * MIB) as memory:
        kernel = loaded(tmp_path / "k", elf(segments, entry=MIB + 2, bits=bits), memory)
        assert (kernel.bits, kernel.entry) == (bits, MIB + 2)
        assert (kernel.start, kernel.end) == (MIB, 3 * MIB + 8192)
        assert kernel.has_entry_64 == (bits == 64)
        assert (kernel.pvh_entry, kernel.is_linux) == (None, False)
        assert memory.read(MIB, len(CODE)) == CODE
        assert memory.read(2 * MIB, 400) == b"data" * 100
        assert memory.read(0, MIB) == bytes(MIB)


@pytest.mark.parametrize("bits", [32, 64])
def test_finds_the_pvh_note_among_others(tmp_path: Path, bits: int) -> None:
    notes = note(b"GNU\0", 3, b"12345678901234567890") + note(b"Xen\0", 6, b"linux\0")
    notes += pvh_note(MIB + 0x40) + LINUX_NOTE
    with GuestMemory(4 * MIB) as memory:
        kernel = loaded(tmp_path / "k", elf(notes=notes, bits=bits), memory)
    assert (kernel.pvh_entry, kernel.is_linux) == (MIB + 0x40, True)


def test_notes_aligned_to_eight(tmp_path: Path) -> None:
    notes = note(b"GNU\0", 5, b"123456789", 8) + note(b"Xen\0", 18, b"\0\0\x11\0", 8)
    with GuestMemory(4 * MIB) as memory:
        assert loaded(tmp_path / "k", elf(notes=notes, note_align=8), memory).pvh_entry == 0x110000


@pytest.mark.parametrize(
    "notes",
    [
        note(b"XeN\0", 18, b"\0\0\x10\0"),
        note(b"Xen\0", 18, b""),
        note(b"Xen\0", 18, b"\0\0\x10"),
        struct.pack("<III", 4, 0xFFFFFFFF, 18) + b"Xen\0\0\0\x10\0",
        struct.pack("<III", 0xFFFFFFFF, 4, 18) + b"Xen\0\0\0\x10\0",
        b"\0" * 11,
    ],
)
def test_broken_notes_are_no_notes(tmp_path: Path, notes: bytes) -> None:
    with GuestMemory(4 * MIB) as memory:
        assert loaded(tmp_path / "k", elf(notes=notes), memory).pvh_entry is None


def test_debians_vmlinux(cloud_kernel: Kernel) -> None:
    path = str(cloud_kernel.vmlinux())
    with InputFile(path, "kernel") as file, GuestMemory(128 * MIB) as memory:
        kernel = Elf(FileSource(file))
        kernel.check_place()
        kernel.load(memory)
        assert kernel.is_linux and kernel.has_entry_64
        assert kernel.entry == 0x1000000
        assert kernel.pvh_entry is not None and kernel.loads(kernel.pvh_entry)
        for segment in kernel.segments:
            assert memory.read(segment.gpa, segment.size) == file.read(segment.offset, segment.size)


def test_a_payload_loads_as_the_file_does(tmp_path: Path) -> None:
    rng = random.Random(3)
    segments = [(MIB * i, rng.randbytes(5000 * i), 5000 * i) for i in range(1, 5)]
    data = elf(segments, notes=pvh_note(MIB))
    for size in (1000, 4096, 7777, len(data)):
        blocks = iter([data[i : i + size] for i in range(0, len(data), size)])
        with GuestMemory(8 * MIB) as memory, GuestMemory(8 * MIB) as wanted:
            kernel = Elf(PayloadSource(blocks, "payload"))
            kernel.load(memory)
            loaded(tmp_path / "k", data, wanted)
            assert kernel.pvh_entry == MIB
            assert memory.read(0, 8 * MIB) == wanted.read(0, 8 * MIB)


def test_a_payload_that_ends_early() -> None:
    data = elf([(MIB, bytes(20000), 20000)])
    with GuestMemory(8 * MIB) as memory:
        kernel = Elf(PayloadSource(iter([data[:8192], data[8192:15000]]), "payload"))
        with pytest.raises(BootError, match="payload is truncated: it has 15000 bytes of 20"):
            kernel.load(memory)
    with pytest.raises(BootError, match="is not an ELF file"):
        Elf(PayloadSource(iter([]), "payload"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (elf(machine=183), "is an ELF file for arm64"),
        (elf(machine=40, bits=32), "is an ELF file for ARM"),
        (elf(machine=0x9026), "is an ELF file for machine 36902"),
        (elf(kind=1), r"is an ELF object \(a kernel module\?\)"),
        (elf(kind=4), "but a core dump"),
        (elf(kind=77), "but of type 77"),
        (elf()[:5] + b"\x02" + elf()[6:], r"for another machine \(class or byte order\)"),
        (elf()[:4] + b"\x07" + elf()[5:], r"for another machine \(class or byte order\)"),
        (elf([]), "has no usable ELF program headers"),
        (elf(((MIB, b"", 0),)), "has nothing to load"),
        (elf(((MIB, bytes(100), 50),)), "larger in the file than in memory"),
        (elf()[:60], "is truncated: its ELF header is not whole"),
        (elf()[:100], "is truncated: its ELF program headers lie past its end"),
        (elf()[:-1], "is truncated: .* a segment ends at"),
        (elf(((0x500, CODE, 100),)), "loads at 0x500, over the boot GDT"),
        (elf(((0, b"", 0x510),)), "loads at 0x0, over the boot GDT"),
        (elf(((0x7C00, CODE, 512),)), "loads at 0x7c00, over the boot tables"),
        (elf(((0x20000, CODE, 512),)), "over the command line"),
        (elf(((0x90000, b"", 0x80000),)), "over the BIOS area"),
        (elf(((layout.HOLE_START - 1, b"", 2),)), "where there is never RAM"),
        (elf(((1 << 63, b"", 1 << 63),)), "where there is never RAM"),
        (elf(((MIB, b"", (1 << 64) - 1),)), "where there is never RAM"),
    ],
)
def test_refuses(tmp_path: Path, data: bytes, message: str) -> None:
    assert re.search(message, refused(tmp_path / "k", data))


def test_low_segments_between_the_tables_are_fine(tmp_path: Path) -> None:
    with GuestMemory(2 * MIB) as memory:
        kernel = loaded(tmp_path / "k", elf(((0x10000, CODE, 0x10000),), entry=0x10000), memory)
        assert kernel.has_entry_64
        assert memory.read(0x10000, len(CODE)) == CODE


def test_fuzzed_headers_raise_boot_errors_only(tmp_path: Path) -> None:
    rng = random.Random(4)
    whole = elf([(MIB, CODE, 4096), (2 * MIB, bytes(300), 300)], notes=pvh_note(MIB) + LINUX_NOTE)
    path = tmp_path / "k"
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(4, len(data))] = rng.choice((0, 0xFF, 0x80, rng.randrange(256)))
        if rng.random() < 0.1:
            del data[rng.randrange(5, len(data)) :]
        with GuestMemory(4 * MIB) as memory:
            path.write_bytes(data)
            try:
                with InputFile(str(path), "kernel") as file:
                    kernel = Elf(FileSource(file))
                    kernel.check_place()
                    if kernel.end <= memory.size:
                        kernel.load(memory)
                outcomes["loaded"] += 1
            except BootError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 100


MULTIBOOT = struct.pack("<III", 0x1BADB002, 3, -(0x1BADB002 + 3) & 0xFFFFFFFF)
MULTIBOOT2 = struct.pack("<IIII", 0xE85250D6, 0, 24, -(0xE85250D6 + 24) & 0xFFFFFFFF) + bytes(8)
ABI_TAG = note(b"GNU\0", 1, bytes(16))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(
    ("code", "notes", "says"),
    [
        (MULTIBOOT + CODE, b"", "is a kernel for a multiboot loader"),
        (MULTIBOOT2 + CODE, b"", "is a kernel for a multiboot loader"),
        (bytes(9000) + MULTIBOOT, b"", "is a kernel for a multiboot loader"),
        (CODE, ABI_TAG, "is a program for an operating system, not a kernel"),
    ],
    ids=["multiboot", "multiboot2", "far back", "static program"],
)
def test_what_is_for_others(
    tmp_path: Path, bits: int, code: bytes, notes: bytes, says: str
) -> None:
    """Also 32-bit code in a 64-bit file, whose entry looks right."""
    path = tmp_path / "k"
    segments = ((MIB, code, 16384),)
    path.write_bytes(elf(segments, notes=notes, bits=bits))
    with GuestMemory(16 * MIB) as memory:
        with pytest.raises(BootError, match=says):
            load(memory, str(path), [], "")
        for more in (pvh_note(MIB), LINUX_NOTE) if bits == 64 else (pvh_note(MIB),):
            path.write_bytes(elf(segments, notes=notes + more, bits=bits))
            load(memory, str(path), [], "")
        if bits == 64:  # a person who knows better
            path.write_bytes(elf(segments, notes=notes, bits=bits))
            load(memory, str(path), [], "", mode="elf64")


PROGRAMS = {
    "shared library": (["-shared", "-fPIC"], "is a shared library or a position-independent"),
    "program": (["-no-pie"], "is a program for an operating system"),
    "position-independent": (["-pie", "-fPIC"], "is a program for an operating system"),
    "static": (["-static"], "is a program for an operating system"),
    "object": (["-c"], "is an ELF object"),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_what_compilers_make(tmp_path: Path, kind: str) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    options, says = PROGRAMS[kind]
    source, path = tmp_path / "p.c", tmp_path / "p"
    source.write_text("int main(void) { return 1; }\n")
    subprocess.run(["gcc", *options, "-o", str(path), str(source)], check=True)
    with GuestMemory(16 * MIB) as memory, pytest.raises(BootError, match=says):
        load(memory, str(path), [], "")


def test_notes_are_looked_into_as_far_as_they_are_notes(tmp_path: Path) -> None:
    """128 segments of 1 MiB full of empty notes would be 11 million of them."""
    data = bytearray(elf(notes=pvh_note(MIB)))
    with GuestMemory(4 * MIB) as memory:
        assert loaded(tmp_path / "k", bytes(data), memory).pvh_entry == MIB
    empty = bytes(MIB)
    ehdr, phdr, count = 64, 56, 127
    headers = bytearray(data[:ehdr])
    struct.pack_into("<H", headers, 56, count + 1)
    at = ehdr + phdr * (count + 1)
    load_at = at + len(empty)
    rows = [(1, 7, load_at, 0, MIB, len(CODE), 4096, 4096)]
    rows += [(4, 4, at, 0, 0, len(empty), len(empty), 4)] * count
    table = b"".join(struct.pack("<IIQQQQQQ", *row) for row in rows)
    data = headers + table + empty + CODE
    with InputFile(str(tmp_path / "k"), "kernel"):
        (tmp_path / "k").write_bytes(data)
    with InputFile(str(tmp_path / "k"), "kernel") as file, GuestMemory(4 * MIB) as memory:
        parsed = Elf(FileSource(file))
        assert sum(size for _, size, _ in parsed._notes) <= NOTES_MAX
        parsed.load(memory)
        assert parsed.pvh_entry is None


def test_segments_over_one_another(tmp_path: Path) -> None:
    """128 times all of guest memory, out of a sparse file."""
    row = (1, 7, 8192, 0, MIB, 6 * MIB, 6 * MIB, 4096)
    data = bytearray(elf())[:64]
    struct.pack_into("<H", data, 56, 128)
    data += struct.pack("<IIQQQQQQ", *row) * 128
    (tmp_path / "k").write_bytes(data)
    with open(tmp_path / "k", "r+b") as sparse:
        sparse.truncate(8 * MIB)
    with InputFile(str(tmp_path / "k"), "kernel") as file, GuestMemory(8 * MIB) as memory:
        parsed = Elf(FileSource(file))
        with pytest.raises(BootError, match="its segments have 805306368 bytes, more than all of"):
            parsed.load(memory)

"""ELF kernels (System V gABI, chapters 4 and 5): segments, entry, the PVH note."""

from __future__ import annotations

import struct

from vmm.errors import BootError

ELFCLASS32, ELFCLASS64 = 1, 2
ELFDATA2LSB = 1
ET_EXEC, ET_DYN = 2, 3
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_NOTE = 1, 4
XEN_ELFNOTE_PHYS32_ENTRY = 18
"""Xen's public/elfnote.h: the physical address of the PVH entry."""

_MACHINES = {8: "MIPS", 20: "PowerPC", 21: "PowerPC", 22: "s390", 40: "ARM", 183: "arm64"}
_MACHINES[243] = "RISC-V"
_EHDR = {ELFCLASS32: struct.Struct("<HHIIIIIHHHHHH"), ELFCLASS64: struct.Struct("<HHIQQQIHHHHHH")}
MAX_SEGMENTS = 128


class Segment:
    """A PT_LOAD segment: `size` bytes of the file at `offset`, `memory_size` in RAM at `gpa`."""

    __slots__ = ("gpa", "memory_size", "offset", "size")

    def __init__(self, gpa: int, offset: int, size: int, memory_size: int) -> None:
        self.gpa = gpa
        self.offset = offset
        self.size = size
        self.memory_size = memory_size


class Elf:
    """A parsed ELF executable for x86.

    Attributes:
        bits: 32 or 64.
        entry: e_entry; Linux's is physical.
        segments: what to load.
        pvh_entry: the GPA of the PVH entry, or None.

    Raises:
        BootError: it cannot be booted; says why.
    """

    __slots__ = ("bits", "data", "entry", "name", "pvh_entry", "segments")

    def __init__(self, data: memoryview, name: str) -> None:
        self.data = data
        self.name = name
        if len(data) < 52 or (len(data) < 64 and data[4] == ELFCLASS64):
            raise BootError(f"{name} is truncated: its ELF header is not whole")
        elf_class = data[4]
        if elf_class not in _EHDR or data[5] != ELFDATA2LSB:
            raise BootError(f"{name} is an ELF file of a strange class or byte order")
        self.bits = 64 if elf_class == ELFCLASS64 else 32
        kind, machine, _, entry, phoff, _, _, _, phentsize, phnum, _, _, _ = _EHDR[
            elf_class
        ].unpack_from(data, 16)
        if machine not in (EM_X86_64, EM_386):
            what = _MACHINES.get(machine, f"machine {machine}")
            raise BootError(f"{name} is an ELF file for {what}; this boots x86-64 kernels")
        if kind not in (ET_EXEC, ET_DYN):
            raise BootError(
                f"{name} is an ELF object, not an executable (a module?); give it a vmlinux"
            )
        wanted = 56 if self.bits == 64 else 32
        if phentsize != wanted or not 0 < phnum <= MAX_SEGMENTS:
            raise BootError(f"{name} has no usable ELF program headers")
        if phoff + phnum * phentsize > len(data):
            raise BootError(f"{name} is truncated: its ELF program headers lie past its end")
        self.entry: int = entry
        self.segments: list[Segment] = []
        self.pvh_entry: int | None = None
        for i in range(phnum):
            self._program_header(phoff + i * phentsize)
        if not self.segments:
            raise BootError(f"{name} has nothing to load (no PT_LOAD segment)")

    def _program_header(self, at: int) -> None:
        if self.bits == 64:
            kind, _, offset, _, paddr, size, memory_size, _ = struct.unpack_from(
                "<IIQQQQQQ", self.data, at
            )
        else:
            kind, offset, _, paddr, size, memory_size, _, _ = struct.unpack_from(
                "<IIIIIIII", self.data, at
            )
        if kind not in (PT_LOAD, PT_NOTE):
            return
        if offset + size > len(self.data):
            raise BootError(
                f"{self.name} is truncated: {len(self.data)} bytes, a segment ends at "
                f"{offset + size}"
            )
        if kind == PT_NOTE:
            self._notes(self.data[offset : offset + size])
        elif memory_size:
            if size > memory_size:
                raise BootError(f"{self.name}: an ELF segment is larger in the file than in memory")
            self.segments.append(Segment(paddr, offset, size, memory_size))

    def _notes(self, notes: memoryview) -> None:
        at = 0
        while at + 12 <= len(notes):
            name_size, desc_size, kind = struct.unpack_from("<III", notes, at)
            name = at + 12
            desc = name + (name_size + 3 & ~3)
            if desc + desc_size > len(notes):
                return
            if kind == XEN_ELFNOTE_PHYS32_ENTRY and bytes(notes[name : name + 4]) == b"Xen\0":
                self.pvh_entry = int.from_bytes(notes[desc : desc + min(desc_size, 8)], "little")
            at = desc + (desc_size + 3 & ~3)

    @property
    def start(self) -> int:
        """The lowest GPA loaded."""
        return min(segment.gpa for segment in self.segments)

    @property
    def end(self) -> int:
        """The GPA after the highest loaded."""
        return max(segment.gpa + segment.memory_size for segment in self.segments)

    @property
    def has_entry_64(self) -> bool:
        """Whether e_entry is a loaded physical address of a 64-bit executable."""
        return self.bits == 64 and any(
            s.gpa <= self.entry < s.gpa + s.memory_size for s in self.segments
        )

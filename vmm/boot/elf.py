"""ELF kernels (System V gABI, chapters 4 and 5): segments, entry, the PVH note.

Everything a header says is checked against the file and the guest's memory before it is used.
"""

from __future__ import annotations

import struct

from vmm import layout
from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.boot.source import FileSource, PayloadSource
    from vmm.memory import GuestMemory

ELFCLASS32, ELFCLASS64 = 1, 2
ELFDATA2LSB = 1
ET_REL, ET_EXEC, ET_DYN, ET_CORE = 1, 2, 3, 4
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE = 1, 2, 3, 4
NT_GNU_ABI_TAG = 1
"""A note that the C library puts into every program (gABI-LSB, "ABI note tag")."""
XEN_ELFNOTE_PHYS32_ENTRY = 18
"""Xen's public/elfnote.h: the physical address of the PVH entry."""

MULTIBOOT_MAGIC, MULTIBOOT2_MAGIC = b"\x02\xb0\xad\x1b", b"\xd6\x50\x52\xe8"
MULTIBOOT_SEARCH = 32768
"""Bytes of a file in which its multiboot header is (8192 for the first version, in the words of its
specification; linkers put it farther back)."""
MAX_SEGMENTS = 128
NOTES_MAX = 64 << 10
"""Bytes of notes that are looked into, all together; what is behind them is not. Linux has 500."""

_MACHINES = {
    2: "SPARC",
    8: "MIPS",
    20: "PowerPC",
    21: "PowerPC",
    22: "s390",
    40: "ARM",
    183: "arm64",
    243: "RISC-V",
    258: "LoongArch",
}
_EHDR = {ELFCLASS32: struct.Struct("<HHIIIIIHHHHHH"), ELFCLASS64: struct.Struct("<HHIQQQIHHHHHH")}
_PHDR = {ELFCLASS32: struct.Struct("<IIIIIIII"), ELFCLASS64: struct.Struct("<IIQQQQQQ")}

_TAKEN = (
    (layout.GDT, layout.GDT + 32, "the boot GDT"),
    (layout.PVH_START_INFO, layout.PML4 + 0x6000, "the boot tables"),
    (layout.CMDLINE, layout.CMDLINE + layout.CMDLINE_MAX, "the command line"),
    (layout.EBDA, layout.HIGH_RAM, "the BIOS area"),
)
"""What the loader itself puts below 1 MiB, and where there is no RAM: (start, end, name)."""


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
        pvh_entry: the GPA of the PVH entry, or None; known once it is loaded.
        is_linux: whether it has a note of Linux's (LINUX_ELFNOTE_BUILD_SALT, in every kernel since
            4.19); known once it is loaded.
        is_program: whether it asks for a dynamic linker, or has a note of the C library's; the
            latter is known once it is loaded.

    Raises:
        BootError: it cannot be booted; says why.
    """

    __slots__ = (
        "_dynamic",
        "_notes",
        "bits",
        "entry",
        "is_linux",
        "is_program",
        "name",
        "pvh_entry",
        "segments",
        "source",
    )

    def __init__(self, source: FileSource | PayloadSource) -> None:
        self.source = source
        self.name = name = source.name
        head = source.read(0, 64)
        if head[:4] != b"\x7fELF":
            raise BootError(f"{name} is not an ELF file")
        if len(head) < 52 or (len(head) < 64 and head[4] == ELFCLASS64):
            raise BootError(f"{name} is truncated: its ELF header is not whole")
        elf_class = head[4]
        if elf_class not in _EHDR or head[5] != ELFDATA2LSB:
            raise BootError(f"{name} is an ELF file for another machine (class or byte order)")
        self.bits = 64 if elf_class == ELFCLASS64 else 32
        kind, machine, _, entry, phoff, _, _, _, phentsize, phnum, _, _, _ = _EHDR[
            elf_class
        ].unpack_from(head, 16)
        if machine not in (EM_X86_64, EM_386):
            what = _MACHINES.get(machine, f"machine {machine}")
            raise BootError(f"{name} is an ELF file for {what}; this boots x86-64 kernels")
        if kind == ET_REL:
            raise BootError(f"{name} is an ELF object (a kernel module?); give it a vmlinux")
        if kind not in (ET_EXEC, ET_DYN):
            what = "a core dump" if kind == ET_CORE else f"of type {kind}"
            raise BootError(f"{name} is an ELF file, but {what}; give it a vmlinux")
        phdr = _PHDR[elf_class]
        if phentsize != phdr.size or not 0 < phnum <= MAX_SEGMENTS:
            raise BootError(f"{name} has no usable ELF program headers")
        table = source.read(phoff, phnum * phentsize)
        if len(table) < phnum * phentsize:
            raise BootError(f"{name} is truncated: its ELF program headers lie past its end")
        self.entry: int = entry
        self.segments: list[Segment] = []
        self.pvh_entry: int | None = None
        self.is_linux = False
        self.is_program = False
        self._dynamic = False
        self._notes: list[tuple[int, int, int]] = []
        for fields in phdr.iter_unpack(table):
            self._program_header(fields)
        if not self.segments:
            raise BootError(f"{name} has nothing to load (no PT_LOAD segment)")
        if self.is_program:
            raise BootError(_program(name, "a program for an operating system"))
        low = min(segment.gpa for segment in self.segments)
        if kind == ET_DYN and self._dynamic and low < layout.HIGH_RAM:
            raise BootError(_program(name, "a shared library or a position-independent program"))

    def _program_header(self, fields: tuple[int, ...]) -> None:
        if self.bits == 64:
            kind, _, offset, _, gpa, size, memory_size, align = fields
        else:
            kind, offset, _, gpa, size, memory_size, _, align = fields
        self.is_program |= kind == PT_INTERP
        self._dynamic |= kind == PT_DYNAMIC
        if kind not in (PT_LOAD, PT_NOTE):
            return
        if size and offset + size > self.source.size:
            raise BootError(
                f"{self.name} is truncated: {self.source.size} bytes, a segment ends at "
                f"{offset + size}"
            )
        if kind == PT_NOTE:
            room = NOTES_MAX - sum(size for _, size, _ in self._notes)
            if 0 < size <= room:
                self._notes.append((offset, size, 8 if align == 8 else 4))
        elif size > memory_size:
            raise BootError(f"{self.name}: an ELF segment is larger in the file than in memory")
        elif memory_size:
            self.segments.append(Segment(gpa, offset, size, memory_size))

    def refuse_others(self) -> None:
        """Refuse, once it is loaded, what is meant for others than a bare machine.

        Raises:
            BootError: it is a program, or a kernel for a multiboot loader alone.
        """
        if self.is_linux or self.pvh_entry is not None:
            return
        if self.is_program:
            raise BootError(_program(self.name, "a program for an operating system"))
        if self._has_multiboot_header():
            raise BootError(
                f"{self.name} is a kernel for a multiboot loader, which starts it in 32-bit mode "
                "(GRUB, qemu -kernel); this boots Linux, and ELF kernels with a PVH note or a "
                "64-bit entry (--boot elf64 tries that)"
            )

    def _has_multiboot_header(self) -> bool:
        """Multiboot 0.6.96, section 3.1; Multiboot2 2.0, section 3.1."""
        head = self.source.read(0, MULTIBOOT_SEARCH)
        for at in range(0, len(head) - 11, 4):
            if head[at : at + 4] == MULTIBOOT_MAGIC:
                fields = struct.unpack_from("<III", head, at)
                if not sum(fields) & 0xFFFFFFFF:
                    return True
        for at in range(0, len(head) - 15, 8):
            if head[at : at + 4] == MULTIBOOT2_MAGIC:
                fields = struct.unpack_from("<IIII", head, at)
                if not sum(fields) & 0xFFFFFFFF:
                    return True
        return False

    def check_place(self) -> None:
        """Refuse segments that lie where nothing can: BootError says which and why."""
        for segment in self.segments:
            start, end = segment.gpa, segment.gpa + segment.memory_size
            for taken, taken_end, what in _TAKEN:
                if start < taken_end and taken < end:
                    raise BootError(
                        f"{self.name} loads at {start:#x}, over {what}; link it to 1 MiB"
                    )
            if end > layout.HOLE_START:
                raise BootError(f"{self.name} loads at {start:#x}, where there is never RAM")

    def load(self, memory: GuestMemory) -> None:
        """Fill guest memory, which is zero until now, and read the notes on the way.

        Raises:
            BootError: the segments lie over one another so often that to load them takes long.
        """
        total = sum(segment.size for segment in self.segments)
        if total > memory.size:
            raise BootError(
                f"{self.name}: its segments have {total} bytes, more than all of guest memory"
            )
        notes = [
            (offset, memoryview(bytearray(size)), align) for offset, size, align in self._notes
        ]
        targets = [(offset, view) for offset, view, _ in notes]
        targets += [(s.offset, memory.view(s.gpa, s.size)) for s in self.segments if s.size]
        self.source.fill(targets)
        for _, view, align in notes:
            self._read_notes(view, align)

    def _read_notes(self, notes: memoryview, align: int) -> None:
        at = 0
        while at + 12 <= len(notes):
            name_size, desc_size, kind = struct.unpack_from("<III", notes, at)
            name = bytes(notes[at + 12 : at + 12 + min(name_size, 6)])
            desc = at + 12 + name_size + align - 1 & -align
            if desc + desc_size > len(notes):
                return
            if name == b"Linux\0":
                self.is_linux = True
            elif name == b"GNU\0" and kind == NT_GNU_ABI_TAG:
                self.is_program = True
            elif name == b"Xen\0" and kind == XEN_ELFNOTE_PHYS32_ENTRY and desc_size in (4, 8):
                self.pvh_entry = int.from_bytes(notes[desc : desc + desc_size], "little")
            at = desc + desc_size + align - 1 & -align

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
        return self.bits == 64 and self.loads(self.entry)

    def loads(self, gpa: int) -> bool:
        """Whether `gpa` is within a segment."""
        return any(s.gpa <= gpa < s.gpa + s.memory_size for s in self.segments)


def _program(name: str, what: str) -> str:
    return f"{name} is {what}, not a kernel; give it a bzImage or vmlinux"

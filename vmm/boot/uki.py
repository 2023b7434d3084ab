"""Unified kernel images (UAPI group, "Unified Kernel Image"): a PE program for UEFI with a kernel,
an initrd and a command line in sections of their own, which is all that is needed to start it.
"""

from __future__ import annotations

import struct

from vmm.boot.file import FilePart
from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.boot.file import InputFile

SECTIONS_MAX = 96
"""What Windows takes; more is no image."""
CMDLINE_MAX = 4096


class Uki:
    """The parts of a unified kernel image.

    Attributes:
        kernel: the .linux section.
        initrds: the .ucode and .initrd sections, those that are there, in this order.
        cmdline: the .cmdline section, in one line without `--` and what follows.
    """

    __slots__ = ("cmdline", "initrds", "kernel")

    def __init__(self, kernel: FilePart, initrds: list[FilePart], cmdline: str) -> None:
        self.kernel = kernel
        self.initrds = initrds
        self.cmdline = cmdline


def find(file: InputFile) -> Uki | None:
    """The parts of `file`, or None where it is no PE program with a .linux section.

    Raises:
        BootError: it is one, and a section lies past its end.
    """
    sections = _sections(file)
    kernel = sections.get(".linux")
    if kernel is None:
        return None
    cmdline = ""
    if ".cmdline" in sections:
        part = sections[".cmdline"]
        text = part.read(0, min(part.size, CMDLINE_MAX)).partition(b"\0")[0]
        cmdline = " ".join(f"{text.decode('utf-8', 'replace')} ".partition(" -- ")[0].split())
    initrds = [sections[name] for name in (".ucode", ".initrd") if name in sections]
    return Uki(kernel, initrds, cmdline)


def _sections(file: InputFile) -> dict[str, FilePart]:
    """The sections of a PE file by name (PE format, "Section Table"); none of another file."""
    head = file.read(0, 64)
    if head[:2] != b"MZ" or len(head) < 64:
        return {}
    (start,) = struct.unpack_from("<I", head, 0x3C)
    coff = file.read(start, 24)
    if coff[:4] != b"PE\0\0" or len(coff) < 24:
        return {}
    count, optional = struct.unpack_from("<H", coff, 6)[0], struct.unpack_from("<H", coff, 20)[0]
    table = file.read(start + 24 + optional, 40 * min(count, SECTIONS_MAX))
    found: dict[str, FilePart] = {}
    for at in range(0, len(table) - 39, 40):
        name = table[at : at + 8].rstrip(b"\0").decode("ascii", "replace")
        memory_size, _, size, offset = struct.unpack_from("<IIII", table, at + 8)
        size = min(size, memory_size) or size
        if not size or name in found:
            continue
        if offset + size > file.size:
            if name in (".linux", ".initrd"):
                raise BootError(f"{file.name} is truncated: its section {name} ends past its end")
            continue
        found[name] = FilePart(file, name, offset, size)
    return found

"""From files to a guest ready to start: picks the protocol, loads kernel, initrds, command line.

How `auto` picks:
    bzImage   its vmlinux, unpacked on the host, at its 64-bit entry, where that can be done;
              else the bzImage's own 64-bit entry, which unpacks itself in the guest
    ELF       its 64-bit entry if e_entry is a loaded physical address and the file is Linux's
              (no PVH note, or loaded from 1 MiB up with a setup-free entry); else PVH
"""

from __future__ import annotations

from vmm import layout
from vmm.boot import formats, pvh, zeropage
from vmm.boot.bzimage import ENTRY_64, BzImage
from vmm.boot.elf import Elf
from vmm.boot.initrd import Initrds, too_little_memory
from vmm.boot.paging import write_gdt, write_page_tables
from vmm.boot.state import BootState
from vmm.errors import BootError
from vmm.units import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.memory import GuestMemory

INITRD_ADDR_MAX = 0x7FFFFFFF
"""Where Linux's own limit is when no setup header says (arch/x86/boot/header.S)."""
CMDLINE_SIZE = 2047
"""COMMAND_LINE_SIZE - 1 of Linux on x86."""


def load(
    memory: GuestMemory,
    kernel: str,
    initrds: Sequence[str],
    cmdline: str,
    *,
    mode: str = "auto",
    rsdp: int | None = None,
    host_decompress: bool | None = None,
) -> BootState:
    """Load `kernel` and what goes with it into guest memory.

    Args:
        kernel: path of a bzImage or an ELF vmlinux.
        initrds: paths, concatenated.
        cmdline: the whole kernel command line.
        mode: `auto`, `bzimage` (its own decompressor), `elf64` or `pvh`; the last two unpack the
            vmlinux of a bzImage.
        rsdp: GPA of the ACPI RSDP, if there is one.
        host_decompress: for `auto`: whether to unpack a bzImage on the host; None decides.

    Raises:
        BootError: a file is wrong, or does not fit; one line says which and why.
    """
    mapping, kind = formats.map_kernel(kernel)
    archives = None
    data = memoryview(mapping)
    try:
        archives = Initrds(initrds)
        if kind == formats.BZIMAGE:
            image = BzImage(data, f"kernel {kernel}")
            return _load_bzimage(memory, image, archives, cmdline, mode, rsdp, host_decompress)
        if mode == "bzimage":
            raise BootError(f"--boot bzimage: kernel {kernel} is an ELF file; use elf64 or pvh")
        elf = Elf(data, f"kernel {kernel}")
        return _load_elf(memory, elf, archives, cmdline, mode, rsdp, None)
    finally:
        if archives is not None:
            archives.close()
        _release(data, mapping)


def extract_vmlinux(path: str) -> bytes:
    """The ELF kernel inside a bzImage."""
    mapping, kind = formats.map_kernel(path)
    data = memoryview(mapping)
    try:
        if kind == formats.ELF:
            return bytes(data)
        return BzImage(data, f"kernel {path}").vmlinux()
    finally:
        _release(data, mapping)


def _release(data: memoryview, mapping: object) -> None:
    """Views of the file may still be held by an exception's frames; then it goes with them."""
    data.release()
    try:
        mapping.close()  # type: ignore[attr-defined]
    except BufferError:
        pass


def _load_bzimage(
    memory: GuestMemory,
    image: BzImage,
    archives: Initrds,
    cmdline: str,
    mode: str,
    rsdp: int | None,
    host_decompress: bool | None,
) -> BootState:
    if mode == "auto":
        mode = "bzimage" if host_decompress is False else "elf64"
        if host_decompress is None and not _quick_to_unpack(image):
            mode = "bzimage"
    if mode in ("elf64", "pvh"):
        elf = Elf(memoryview(image.vmlinux()), f"vmlinux of {image.name}")
        return _load_elf(memory, elf, archives, cmdline, mode, rsdp, image)
    if not image.has_entry_64:
        raise BootError(f"{image.name} is a 32-bit kernel; this boots x86-64 kernels")
    _write_cmdline(memory, cmdline, image.cmdline_size)
    start = max(image.pref_address, layout.HIGH_RAM)
    end = start + max(image.init_size, len(image.protected_mode))
    if end > memory.regions[0].size:
        raise too_little_memory(memory.size, end + archives.size, "its work space")
    memory.write(start, image.protected_mode)
    initrd = archives.load(memory, end, image.initrd_addr_max)
    zero_page = zeropage.write_zero_page(memory, header=image.header, initrd=initrd, rsdp=rsdp)
    return _long_mode(
        memory,
        start + ENTRY_64,
        zero_page,
        [
            f"bzImage, boot protocol {image.version >> 8}.{image.version & 0xFF:02d}, "
            f"{format_size(len(image.data))} at {start:#x}, unpacks itself ({image.compression})",
            *_initrd_line(initrd),
        ],
    )


def _quick_to_unpack(image: BzImage) -> bool:
    """Whether the host unpacks the payload sooner than the guest would: its library is there."""
    if not image.payload_length:
        return False
    names = {"lz4": "lz4", "zstd": "zstandard", "lzo": "lzo"}
    kind = image.compression
    if kind not in names:
        return kind in ("gzip", "xz", "lzma", "bzip2", "none")
    from importlib.util import find_spec

    return find_spec(names[kind]) is not None


def _load_elf(
    memory: GuestMemory,
    elf: Elf,
    archives: Initrds,
    cmdline: str,
    mode: str,
    rsdp: int | None,
    image: BzImage | None,
) -> BootState:
    if mode == "auto":
        mode = "elf64" if _is_linux(elf) else "pvh"
    if mode == "elf64" and not elf.has_entry_64:
        raise BootError(f"--boot elf64: {elf.name} has no 64-bit entry at a loaded address")
    if mode == "pvh" and elf.pvh_entry is None:
        raise BootError(f"--boot pvh: {elf.name} has no PVH note (CONFIG_PVH); try elf64")
    _write_cmdline(memory, cmdline, image.cmdline_size if image else CMDLINE_SIZE)
    _load_segments(memory, elf, archives)
    limit = image.initrd_addr_max if image else INITRD_ADDR_MAX
    lowest = max(elf.end, layout.HIGH_RAM) + layout.PAGE_SIZE - 1 & ~(layout.PAGE_SIZE - 1)
    if image is not None:
        # The kernel needs room after its image (brk, early page tables): init_size covers it.
        lowest = max(lowest, elf.start + image.init_size)
    initrd = archives.load(memory, lowest, limit)
    what = f"ELF kernel at {elf.start:#x}..{elf.end - 1:#x}"
    if image is not None:
        what = f"vmlinux of a bzImage ({image.compression}, unpacked by the host), {what[4:]}"
    lines = [what, *_initrd_line(initrd)]
    if mode == "elf64":
        header = image.header if image else None
        zero_page = zeropage.write_zero_page(memory, header=header, initrd=initrd, rsdp=rsdp)
        return _long_mode(memory, elf.entry, zero_page, lines)
    assert elf.pvh_entry is not None
    write_gdt(memory)
    start_info = pvh.write_start_info(memory, initrd=initrd, rsdp=rsdp)
    lines.append(f"starts at {elf.pvh_entry:#x}, PVH")
    return BootState(
        "pvh32", elf.pvh_entry, rbx=start_info, rsp=layout.BOOT_STACK, description=lines
    )


def _is_linux(elf: Elf) -> bool:
    """A vmlinux, whose e_entry takes the zero page: 64-bit, with an entry at the first loaded
    byte of its text, 1 MiB or higher, and the percpu or init segments Linux has (three or more).
    Anything else with a PVH note is started through that."""
    if elf.pvh_entry is None:
        return True
    return elf.has_entry_64 and elf.entry >= layout.HIGH_RAM and len(elf.segments) >= 3


def _load_segments(memory: GuestMemory, elf: Elf, archives: Initrds) -> None:
    low_end = memory.regions[0].size
    for segment in elf.segments:
        end = segment.gpa + segment.memory_size
        if segment.gpa < layout.HIGH_RAM:
            if layout.PVH_START_INFO <= end and segment.gpa < layout.CMDLINE + layout.CMDLINE_MAX:
                raise BootError(
                    f"{elf.name} loads at {segment.gpa:#x}, over the boot tables; link it to 1 MiB"
                )
            if end > layout.EBDA:
                raise BootError(f"{elf.name} loads at {segment.gpa:#x}, into the BIOS area")
        if end > layout.HOLE_START:
            raise BootError(f"{elf.name} loads at {segment.gpa:#x}, where there is never RAM")
        if end > low_end:
            raise too_little_memory(memory.size, end + archives.size, "its segments")
    for segment in elf.segments:
        part = elf.data[segment.offset : segment.offset + segment.size]
        memory.write(segment.gpa, part)  # what follows in memory (bss) is zero already


def _write_cmdline(memory: GuestMemory, cmdline: str, limit: int) -> None:
    line = cmdline.encode("utf-8", "surrogateescape")
    limit = min(limit or CMDLINE_SIZE, layout.CMDLINE_MAX - 1)
    if len(line) > limit:
        raise BootError(
            f"--append: the command line has {len(line)} bytes, this kernel takes {limit}"
        )
    memory.write(layout.CMDLINE, line + b"\0")


def _long_mode(memory: GuestMemory, rip: int, zero_page: int, lines: list[str]) -> BootState:
    write_gdt(memory)
    lines.append(f"starts at {rip:#x}, 64-bit boot protocol")
    return BootState(
        "long64",
        rip,
        rsi=zero_page,
        rsp=layout.BOOT_STACK,
        cr3=write_page_tables(memory),
        description=lines,
    )


def _initrd_line(initrd: tuple[int, int]) -> list[str]:
    return [f"initrd, {format_size(initrd[1])} at {initrd[0]:#x}"] if initrd[1] else []

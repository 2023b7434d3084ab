"""From files to a guest ready to start: picks the protocol, loads kernel, initrds, command line.

How `auto` picks:
    bzImage   its vmlinux, unpacked by the host, as the ELF file it is (below), where the host has
              the library for it; else the bzImage's own 64-bit entry, which unpacks itself in the
              guest. The host is never slower at it, and much faster where guest kernel code is
              emulated. A vmlinux started directly does not relocate itself: no KASLR. Ask for
              `bzimage` where that matters.
    ELF       its 64-bit entry, if e_entry is a loaded physical address and the file is Linux's own
              (it has a note named "Linux") or has no PVH note; else PVH.

Nothing is written to guest memory before all files are known to fit.
"""

from __future__ import annotations

from vmm import layout
from vmm.boot import formats, pvh, zeropage
from vmm.boot.bzimage import ENTRY_64, BzImage
from vmm.boot.decompress import UNPACKED_MAX
from vmm.boot.elf import Elf
from vmm.boot.file import InputFile
from vmm.boot.initrd import Initrds
from vmm.boot.paging import CODE_32, CODE_64, write_gdt, write_page_tables
from vmm.boot.source import FileSource
from vmm.boot.state import BootState
from vmm.errors import BootError, UsageError
from vmm.units import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.boot.uki import Uki
    from vmm.memory import GuestMemory

MODES = ("auto", "bzimage", "elf64", "pvh")
INITRD_ADDR_MAX = 0x7FFFFFFF
"""Where Linux's own limit is when no setup header says (arch/x86/boot/header.S)."""
CMDLINE_SIZE = 2047
"""COMMAND_LINE_SIZE - 1 of Linux on x86."""


def load(
    memory: GuestMemory,
    kernel: str,
    initrds: Sequence[str | bytes],
    cmdline: str,
    *,
    mode: str = "auto",
    rsdp: int | None = None,
    host_decompress: bool | None = None,
) -> BootState:
    """Load `kernel` and what goes with it into guest memory, which must be zero still.

    Args:
        kernel: path of a bzImage or an ELF vmlinux.
        initrds: paths, or archives in memory, concatenated.
        cmdline: the whole kernel command line.
        mode: `auto`, `bzimage` (its own decompressor), `elf64` or `pvh`; the last two unpack the
            vmlinux of a bzImage.
        rsdp: GPA of the ACPI RSDP, if there is one.
        host_decompress: for `auto`: whether to unpack a bzImage on the host; None decides.

    Raises:
        BootError: a file is wrong, or does not fit; one line says which and why.
    """
    if mode not in MODES:
        raise UsageError(f"--boot {mode!r} is not one of {', '.join(MODES)}")
    with InputFile(kernel, "kernel") as whole, Initrds(initrds) as archives:
        unified = _unified(whole)
        file = unified.kernel if unified is not None else whole
        job = _Job(memory, archives, cmdline, rsdp)
        if unified is not None:
            job.add(unified)
        if formats.identify(file) == formats.ELF:
            if mode == "bzimage":
                raise BootError(f"--boot bzimage: {file.name} is an ELF file; use elf64 or pvh")
            return job.elf(Elf(FileSource(file)), mode, None)
        image = BzImage(file)
        if mode == "bzimage" or (mode == "auto" and not _unpack_here(image, host_decompress)):
            return job.bzimage(image)
        source = image.source()
        try:
            return job.elf(Elf(source), mode, image)
        finally:
            source.close()


def extract_vmlinux(path: str, limit: int = UNPACKED_MAX) -> bytes:
    """The ELF kernel inside a bzImage; an ELF file as it is.

    Args:
        path: of the kernel.
        limit: the most bytes that the result may have.

    Raises:
        BootError: there is none, or it is larger.
    """
    with InputFile(path, "kernel") as whole:
        unified = _unified(whole)
        file = unified.kernel if unified is not None else whole
        if formats.identify(file) == formats.ELF:
            if file.size > limit:
                raise BootError(f"{file.name} has {file.size} bytes, more than {limit}")
            return file.read(0, file.size)
        return BzImage(file).vmlinux(limit)


def _unified(file: InputFile) -> Uki | None:
    """The parts of a unified kernel image, if `file` is one."""
    if not formats.is_other_pe(file):
        return None
    from vmm.boot import uki

    return uki.find(file)


def _unpack_here(image: BzImage, wish: bool | None) -> bool:
    """Whether `auto` unpacks on the host: as wished, or where the host can."""
    return image.can_unpack() if wish is None else wish


class _Job:
    """What every way of loading needs."""

    __slots__ = ("archives", "cmdline", "lines", "memory", "rsdp")

    def __init__(
        self, memory: GuestMemory, archives: Initrds, cmdline: str, rsdp: int | None
    ) -> None:
        self.memory = memory
        self.archives = archives
        self.cmdline = cmdline
        self.rsdp = rsdp
        self.lines: list[str] = []

    def add(self, unified: Uki) -> None:
        """The initrds and the command line of a unified kernel image, before the person's."""
        self.archives.put_first(unified.initrds)
        self.cmdline = f"{unified.cmdline} {self.cmdline}".strip()
        self.lines.append("unified kernel image")
        if unified.cmdline:
            self.lines.append(f"its command line, before the other: {unified.cmdline}")

    def bzimage(self, image: BzImage) -> BootState:
        """A bzImage at its own 64-bit entry."""
        if not image.has_entry_64:
            why = "is a 32-bit kernel"
            if image.version < 0x020C:
                why = "is older than Linux 3.8, or no Linux (ipxe.lkrn)"
            raise BootError(
                f"{image.name} {why}: it has no 64-bit entry; this boots x86-64 kernels"
            )
        line = _command_line(self.cmdline, image.cmdline_size)
        start = image.load_address
        end = start + max(image.init_size, image.kernel_size)
        initrd = self.archives.place(self.memory, end, image.initrd_addr_max)
        self._write_common(line, initrd)
        image.file.read_into(image.kernel_offset, self.memory.view(start, image.kernel_size))
        what = (
            f"bzImage, boot protocol {image.protocol}, {format_size(image.file.size)} "
            f"at {start:#x}, unpacks itself ({image.compression})"
        )
        # Programs in a bzImage's clothes (memtest86+) have no payload.
        linux = image.compression != "unknown"
        if linux:
            self.archives.check()
        return self._long64(start + ENTRY_64, image, initrd, [*self.lines, what], linux)

    def elf(self, elf: Elf, mode: str, image: BzImage | None) -> BootState:
        """An ELF kernel, the vmlinux of `image` if that is given."""
        if mode == "elf64" and not elf.has_entry_64:
            raise BootError(f"--boot elf64: {elf.name} has no 64-bit entry at a loaded address")
        elf.check_place()
        line = _command_line(self.cmdline, image.cmdline_size if image else CMDLINE_SIZE)
        end = max(elf.end, layout.HIGH_RAM)
        if image is not None:
            # Room for what Linux sets up after its image; a bare vmlinux has it in its segments.
            end = max(end, elf.start + image.init_size)
        highest = image.initrd_addr_max if image else INITRD_ADDR_MAX
        initrd = self.archives.place(self.memory, end, highest)
        self._write_common(line, initrd)
        elf.load(self.memory)
        what = f"ELF kernel at {elf.start:#x}..{elf.end - 1:#x}"
        if image is not None:
            what = f"vmlinux of a bzImage ({image.compression}, unpacked by the host){what[10:]}"
        linux = elf.is_linux or image is not None
        if linux:
            self.archives.check()
        elif mode != "elf64":
            elf.refuse_others()
        if _use_pvh(elf, mode, image):
            return self._pvh32(elf, initrd, [*self.lines, what], linux)
        return self._long64(elf.entry, image, initrd, [*self.lines, what], linux)

    def _write_common(self, line: bytes, initrd: tuple[int, int]) -> None:
        self.memory.write(layout.CMDLINE, line + b"\0")
        self.archives.load(self.memory, initrd[0])

    def _long64(
        self,
        rip: int,
        image: BzImage | None,
        initrd: tuple[int, int],
        lines: list[str],
        linux: bool,
    ) -> BootState:
        write_gdt(self.memory, CODE_64)
        header = image.header if image else None
        zero_page = zeropage.write_zero_page(
            self.memory, header=header, initrd=initrd, rsdp=self.rsdp
        )
        lines += _initrd_line(initrd)
        lines.append(f"starts at {rip:#x}, 64-bit boot protocol")
        return BootState(
            "long64",
            rip,
            rsi=zero_page,
            rsp=layout.BOOT_STACK,
            cr3=write_page_tables(self.memory),
            is_linux=linux,
            description=lines,
        )

    def _pvh32(self, elf: Elf, initrd: tuple[int, int], lines: list[str], linux: bool) -> BootState:
        assert elf.pvh_entry is not None
        write_gdt(self.memory, CODE_32)
        start_info = pvh.write_start_info(self.memory, initrd=initrd, rsdp=self.rsdp)
        lines += _initrd_line(initrd)
        lines.append(f"starts at {elf.pvh_entry:#x}, PVH")
        return BootState(
            "pvh32",
            elf.pvh_entry,
            rbx=start_info,
            rsp=layout.BOOT_STACK,
            is_linux=linux,
            description=lines,
        )


def _use_pvh(elf: Elf, mode: str, image: BzImage | None) -> bool:
    """Whether a loaded ELF kernel starts through PVH, else its 64-bit entry; see the module."""
    entry = elf.pvh_entry
    if mode == "elf64":
        return False
    linux = elf.is_linux or image is not None
    if mode == "auto" and elf.has_entry_64 and (linux or entry is None):
        return False
    if entry is not None:
        if not elf.loads(entry):
            raise BootError(f"{elf.name}: its PVH note names {entry:#x}, where it loads nothing")
        return True
    if mode == "pvh":
        raise BootError(f"--boot pvh: {elf.name} has no PVH note (CONFIG_PVH); try elf64")
    if elf.bits == 32:
        raise BootError(f"{elf.name} is a 32-bit ELF file without a PVH note; this cannot start it")
    raise BootError(f"{elf.name} has neither a 64-bit entry at a loaded address nor a PVH note")


def _command_line(cmdline: str, limit: int) -> bytes:
    """It as bytes, checked against the kernel's cmdline_size (without the NUL; 0 is unknown)."""
    try:
        line = cmdline.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as err:
        raise BootError(f"--append: no way to write character {err.start + 1} as UTF-8") from None
    limit = min(limit or CMDLINE_SIZE, layout.CMDLINE_MAX - 1)
    if len(line) > limit:
        raise BootError(
            f"--append: the command line has {len(line)} bytes, this kernel takes {limit}"
        )
    if b"\0" in line:
        raise BootError("--append: the command line has a NUL character in it")
    return line


def _initrd_line(initrd: tuple[int, int]) -> list[str]:
    return [f"initrd, {format_size(initrd[1])} at {initrd[0]:#x}"] if initrd[1] else []

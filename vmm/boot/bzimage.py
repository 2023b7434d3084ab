"""bzImage: the setup header and the 64-bit boot protocol (Documentation/arch/x86/boot.rst)."""

from __future__ import annotations

import struct

from vmm import layout
from vmm.boot import decompress
from vmm.boot.source import PAYLOAD_MAX, PayloadSource, close
from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.boot.file import FilePart, InputFile

MAGIC_OFFSET = 0x202
MAGIC = b"HdrS"
BOOT_FLAG = 0xAA55
HEADER_START = 0x1F1
HEADER_END_MIN = 0x268
"""Past the last field looked at; every kernel of protocol 2.10 or later has more."""
HEADER_END_MAX = 0x290
"""Where edd_mbr_sig_buffer begins in struct boot_params: no header is copied past it."""
MIN_VERSION = 0x0206
"""2.06 brought cmdline_size; older kernels (before 2.6.22) know no 64-bit entry either."""
LOADED_HIGH = 1 << 0
XLF_KERNEL_64 = 1 << 0
ENTRY_64 = 0x200
"""The 64-bit entry's offset in the protected-mode kernel."""
SECTOR = 512
BESIDE_MAX = 32 << 20
"""Bytes that a vmlinux may have beside what it takes in memory (`init_size`): headers, padding
before its first segment, relocations. All of Debian's is less than `init_size`."""
SLOW = frozenset({"gzip", "xz", "lzma", "bzip2", "zstd"})
"""Formats that take longer to unpack than to read unpacked (`vmm.boot.cache`). LZ4 does not."""


class BzImage:
    """A parsed bzImage. Attributes are the setup header's fields, by their names.

    Args:
        file: the open file.

    Attributes:
        kernel_offset, kernel_size: the protected-mode kernel in the file, bytes.
        header: the setup header, from offset 0x1f1, as it goes into the zero page.

    Raises:
        BootError: it is no bzImage this can boot; says why.
    """

    __slots__ = (
        "cmdline_size",
        "file",
        "header",
        "init_size",
        "initrd_addr_max",
        "kernel_alignment",
        "kernel_offset",
        "kernel_size",
        "name",
        "payload_length",
        "payload_offset",
        "pref_address",
        "relocatable_kernel",
        "version",
        "xloadflags",
    )

    def __init__(self, file: InputFile | FilePart) -> None:
        self.file = file
        self.name = name = file.name
        head = file.read(0, HEADER_END_MAX)
        if len(head) < HEADER_END_MIN:
            raise BootError(f"{name} is truncated: its setup header is not whole")
        (flag,) = struct.unpack_from("<H", head, 0x1FE)
        if flag != BOOT_FLAG or head[MAGIC_OFFSET : MAGIC_OFFSET + 4] != MAGIC:
            raise BootError(f"{name} is no bzImage: the setup header's magic is missing")
        (self.version,) = struct.unpack_from("<H", head, 0x206)
        if self.version < MIN_VERSION:
            raise BootError(
                f"{name} has boot protocol {self.protocol}, as Linux before 2.6.22 and programs in "
                "its clothes have (ipxe.lkrn, memdisk); give it a kernel with 2.06 or later"
            )
        if not head[0x211] & LOADED_HIGH:
            raise BootError(
                f"{name} is a zImage, not a bzImage; a kernel of this century is needed"
            )
        self.initrd_addr_max, self.kernel_alignment = struct.unpack_from("<II", head, 0x22C)
        self.relocatable_kernel = head[0x234]
        (self.cmdline_size,) = struct.unpack_from("<I", head, 0x238)
        self.payload_offset = self.payload_length = 0
        self.xloadflags = self.pref_address = self.init_size = 0
        if self.version >= 0x0208:
            self.payload_offset, self.payload_length = struct.unpack_from("<II", head, 0x248)
        if self.version >= 0x020A:
            self.pref_address, self.init_size = struct.unpack_from("<QI", head, 0x258)
        if self.version >= 0x020C:
            (self.xloadflags,) = struct.unpack_from("<H", head, 0x236)
        self.kernel_offset = ((head[HEADER_START] or 4) + 1) * SECTOR
        (syssize,) = struct.unpack_from("<I", head, 0x1F4)
        end = self.kernel_offset + syssize * 16
        # syssize counts 16-byte paragraphs, rounded up; a signed image has more after it.
        if self.kernel_offset + ENTRY_64 >= file.size or end - 15 > file.size:
            raise BootError(f"{name} is truncated: {file.size} bytes of {end} its header announces")
        self.kernel_size = min(end, file.size) - self.kernel_offset
        self.header = head[HEADER_START : min(0x202 + head[0x201], HEADER_END_MAX)]

    @property
    def protocol(self) -> str:
        """The boot protocol's version, as boot.rst writes it: `2.15`."""
        return f"{self.version >> 8}.{self.version & 0xFF:02d}"

    @property
    def has_entry_64(self) -> bool:
        """Whether it starts in long mode (XLF_KERNEL_64)."""
        return bool(self.xloadflags & XLF_KERNEL_64)

    @property
    def load_address(self) -> int:
        """The GPA it is loaded at and unpacks itself to, with kernel_size or init_size of room.

        A lower one would save nothing: a relocatable kernel moves itself up to pref_address.
        """
        return max(self.pref_address, layout.HIGH_RAM)

    @property
    def compression(self) -> str:
        """The payload's format: a name of `decompress`, `none` (an ELF file as it is), or
        `unknown`."""
        start, size = self._payload()
        head = self.file.read(start, min(size, 6))
        return decompress.detect(head) or ("none" if head[:4] == b"\x7fELF" else "unknown")

    def can_unpack(self) -> bool:
        """Whether this host has what it takes to unpack the payload."""
        kind = self.compression
        return kind == "none" or decompress.available(kind)

    def vmlinux(self, limit: int = decompress.UNPACKED_MAX) -> bytes:
        """The ELF kernel in the payload, unpacked and whole. Raises BootError, also where that is
        more than `limit` bytes, or than the kernel has room for when it unpacks itself."""
        if self.init_size:
            limit = min(limit, self.init_size + BESIDE_MAX)
        blocks = self._blocks()
        try:
            return decompress.joined(blocks, f"{self.name} unpacks", limit)
        finally:
            close(blocks)

    def source(self) -> PayloadSource:
        """The ELF kernel in the payload, unpacked as it is read."""
        return PayloadSource(self._blocks(cached=True), f"the vmlinux of {self.name}")

    def _blocks(self, *, cached: bool = False) -> Iterator[bytes]:
        start, size = self._payload()
        kind = self.compression
        if not size:
            raise BootError(f"{self.name} does not tell where its vmlinux is; try --boot bzimage")
        if kind == "unknown":
            raise BootError(f"{self.name}: its payload has an unknown compression")
        if size > PAYLOAD_MAX:
            raise BootError(f"{self.name}: its payload of {size} bytes is no kernel")
        payload = self.file.read(start, size)
        if kind == "none":
            blocks: Iterator[bytes] = iter((payload,))
        elif cached and kind in SLOW:
            from vmm.boot import cache

            blocks = cache.blocks(payload, kind, lambda: decompress.blocks(payload, kind))
        else:
            blocks = decompress.blocks(payload, kind)
        try:
            for number, block in enumerate(blocks):
                if not number and block[:4] != b"\x7fELF":
                    raise BootError("its payload is not an ELF kernel")
                yield block
        except BootError as err:
            raise BootError(f"{self.name}: {err}") from None
        finally:
            close(blocks)

    def _payload(self) -> tuple[int, int]:
        """Offset in the file and bytes; 0 bytes if the header tells no place in the kernel."""
        start, size = self.payload_offset, self.payload_length
        if not start or start + size > self.kernel_size:
            return 0, 0
        return self.kernel_offset + start, size

"""bzImage: the setup header and the 64-bit boot protocol (Documentation/arch/x86/boot.rst)."""

from __future__ import annotations

import struct

from vmm.boot import decompress
from vmm.errors import BootError

MAGIC_OFFSET = 0x202
MAGIC = b"HdrS"
BOOT_FLAG = 0xAA55
HEADER_START = 0x1F1
MIN_VERSION = 0x0206
"""2.06 brought cmdline_size; older kernels (before 2.6.22) know no 64-bit entry either."""
LOADED_HIGH = 1 << 0
XLF_KERNEL_64 = 1 << 0
XLF_CAN_BE_LOADED_ABOVE_4G = 1 << 1
ENTRY_64 = 0x200
"""The 64-bit entry's offset in the protected-mode kernel."""
SECTOR = 512


class BzImage:
    """A parsed bzImage. Attributes are the setup header's fields, by their names.

    Args:
        data: the whole file.
        name: its name, for messages.

    Raises:
        BootError: it is no bzImage this can boot; says why.
    """

    __slots__ = (
        "cmdline_size",
        "data",
        "header",
        "init_size",
        "initrd_addr_max",
        "kernel_alignment",
        "name",
        "payload_length",
        "payload_offset",
        "pref_address",
        "protected_mode",
        "relocatable_kernel",
        "setup_sects",
        "version",
        "xloadflags",
    )

    def __init__(self, data: memoryview, name: str) -> None:
        self.data = data
        self.name = name
        if len(data) < 0x268:
            raise BootError(f"{name} is truncated: its setup header is not whole")
        (flag,) = struct.unpack_from("<H", data, 0x1FE)
        if flag != BOOT_FLAG or bytes(data[MAGIC_OFFSET : MAGIC_OFFSET + 4]) != MAGIC:
            raise BootError(f"{name} is no bzImage: the setup header's magic is missing")
        (self.version,) = struct.unpack_from("<H", data, 0x206)
        if self.version < MIN_VERSION:
            raise BootError(
                f"{name} has boot protocol {self.version >> 8}.{self.version & 0xFF:02d}; "
                "2.06 (Linux 2.6.22) or later is needed"
            )
        if not data[0x211] & LOADED_HIGH:
            raise BootError(
                f"{name} is a zImage, not a bzImage; a kernel of this century is needed"
            )
        self.setup_sects = data[HEADER_START] or 4
        (self.initrd_addr_max,) = struct.unpack_from("<I", data, 0x22C)
        (self.kernel_alignment,) = struct.unpack_from("<I", data, 0x230)
        self.relocatable_kernel = data[0x234]
        (self.cmdline_size,) = struct.unpack_from("<I", data, 0x238)
        self.payload_offset = self.payload_length = 0
        self.xloadflags = self.pref_address = self.init_size = 0
        if self.version >= 0x0208:
            self.payload_offset, self.payload_length = struct.unpack_from("<II", data, 0x248)
        if self.version >= 0x020A:
            self.pref_address, self.init_size = struct.unpack_from("<QI", data, 0x258)
        if self.version >= 0x020C:
            (self.xloadflags,) = struct.unpack_from("<H", data, 0x236)
        start = (self.setup_sects + 1) * SECTOR
        (syssize,) = struct.unpack_from("<I", data, 0x1F4)
        end = start + syssize * 16
        # syssize counts 16-byte paragraphs, rounded up; a signed image has more after it.
        if start >= len(data) or end - 15 > len(data):
            raise BootError(f"{name} is truncated: {len(data)} bytes of {end} its header announces")
        self.protected_mode = data[start : min(end, len(data))]
        self.header = data[HEADER_START : min(0x202 + data[0x201], 0x290)]

    @property
    def has_entry_64(self) -> bool:
        """Whether it starts in long mode (XLF_KERNEL_64)."""
        return bool(self.xloadflags & XLF_KERNEL_64)

    @property
    def compression(self) -> str:
        """The payload's format, or `none` where it is not known."""
        return decompress.detect(self._payload()) or "none"

    def vmlinux(self) -> bytes:
        """The ELF kernel in the payload, unpacked."""
        payload = self._payload()
        if not payload:
            raise BootError(f"{self.name}: boot protocol too old to tell where its vmlinux is")
        if bytes(payload[:4]) == b"\x7fELF":
            return bytes(payload)
        kind = decompress.detect(payload)
        if kind is None:
            raise BootError(f"{self.name}: its payload has an unknown compression")
        try:
            image = decompress.decompress(payload, kind)
        except BootError as err:
            raise BootError(f"{self.name}: {err}") from None
        if image[:4] != b"\x7fELF":
            raise BootError(f"{self.name}: its payload is not an ELF kernel")
        return image

    def _payload(self) -> memoryview:
        start, size = self.payload_offset, self.payload_length
        if not start or start + size > len(self.protected_mode):
            return self.protected_mode[:0]
        return self.protected_mode[start : start + size]

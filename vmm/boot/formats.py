"""What kind of file was given as a kernel; each wrong kind has its own message."""

from __future__ import annotations

from vmm.boot import decompress
from vmm.boot.bzimage import BOOT_FLAG, HEADER_END_MIN, MAGIC, MAGIC_OFFSET
from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.boot.file import InputFile

BZIMAGE, ELF = "bzImage", "ELF"

_CPIO_MAGICS = (b"070701", b"070702", b"070707")
_PEEK = 16 << 20
"""Packed bytes read to tell what a compressed file is."""
_TEXT = bytes(range(0x20, 0x7F)) + b"\t\r\n\f"


def identify(file: InputFile) -> str:
    """BZIMAGE or ELF, by the magics.

    Raises:
        BootError: it is something else; says what, and what would work.
    """
    head = file.read(0, HEADER_END_MIN)
    if head[:4] == b"\x7fELF":
        return ELF
    has_flag = head[0x1FE:0x200] == BOOT_FLAG.to_bytes(2, "little")
    if has_flag and head[MAGIC_OFFSET : MAGIC_OFFSET + 4] == MAGIC:
        return BZIMAGE
    kind = decompress.detect(head)
    what = _packed(file, kind) if kind else _known(head) or _unknown(head)
    raise BootError(f"{file.name} {what}")


def _known(head: bytes) -> str | None:
    """What a file that begins with `head` is, by its magic."""
    for machine, magic in (("arm64", b"ARM\x64"), ("RISC-V", b"RSC\x05")):
        if head[0x38:0x3C] == magic:
            return f"is a kernel Image for {machine}; this boots x86-64 kernels"
    if head[:2] == b"MZ":
        if len(head) < HEADER_END_MIN:
            return "is truncated: it starts like a bzImage and ends before its setup header does"
        if head[4:8] == b"zimg":
            return "is an EFI zboot image, of another machine; this boots x86-64 kernels"
        return "is a PE program without a Linux kernel's magic; give it a bzImage or vmlinux"
    if head[:6] in _CPIO_MAGICS or head[:2] == b"\xc7\x71":
        return "is an initrd (a cpio archive); give it with --initrd, and a kernel first"
    if head[:4] == b"\x27\x05\x19\x56":
        return "is a U-Boot uImage; give it the bzImage or vmlinux it was made from"
    if head[:4] == b"\xd0\x0d\xfe\xed":
        return "is a device tree or FIT image; give it a bzImage or vmlinux"
    if head[:8] == b"!<arch>\n":
        return "is a package or archive; unpack it (dpkg -x) and give it boot/vmlinuz-*"
    if head[:4] == b"QFI\xfb":
        return "is a disk image (qcow2); give it a kernel"
    if head[:2] == b"#!":
        return "is a script; give it a bzImage or vmlinux"
    return None


def _unknown(head: bytes) -> str:
    if not head.strip(b"\0"):
        return "is all zeroes where a kernel begins"
    if not head.translate(None, _TEXT):
        return "is a text file; give it a bzImage or vmlinux"
    if head[0x1FE:0x200] == BOOT_FLAG.to_bytes(2, "little"):
        return "is a boot sector or disk image without a Linux kernel's magic; give it a kernel"
    return "is not a kernel this can boot: neither a bzImage nor an ELF vmlinux"


def _packed(file: InputFile, kind: str) -> str:
    """What is in a compressed file, as far as its first block tells."""
    try:
        content = next(decompress.blocks(file.read(0, _PEEK), kind), b"")[:HEADER_END_MIN]
    except BootError:  # broken, or no library for it
        content = b""
    if content[:6] in _CPIO_MAGICS:
        return f"is an initrd (a {kind} cpio archive); give it with --initrd, and a kernel first"
    if content[:4] == b"\x7fELF":
        return f"is an ELF file packed with {kind}; unpack it first"
    known = content and _known(content)
    if known:
        return f"is {kind} data, and what is in it {known}"
    return f"is {kind} data: an initrd goes to --initrd, a packed kernel must be unpacked first"

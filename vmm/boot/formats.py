"""What kind of file was given as a kernel; each wrong kind has its own message."""

from __future__ import annotations

from vmm.boot import decompress
from vmm.boot.bzimage import BOOT_FLAG, HEADER_END_MIN, MAGIC, MAGIC_OFFSET
from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.boot.file import FilePart, InputFile

BZIMAGE, ELF = "bzImage", "ELF"

_CPIO_MAGICS = (b"070701", b"070702", b"070707")
_PEEK = 16 << 20
"""Packed bytes read to tell what a compressed file is."""
_UNPACK = {
    "gzip": "zcat",
    "xz": "xzcat",
    "lzma": "lzcat",
    "bzip2": "bzcat",
    "zstd": "zstdcat",
    "lz4": "lz4cat",
    "lzo": "lzop -dc",
}
_TEXT = bytes(range(0x20, 0x7F)) + b"\t\r\n\f"


def is_other_pe(file: InputFile) -> bool:
    """Whether it is a PE file, as a bzImage is, but no bzImage."""
    head = file.read(0, MAGIC_OFFSET + 4)
    return head[:2] == b"MZ" and head[MAGIC_OFFSET:] != MAGIC


def identify(file: InputFile | FilePart) -> str:
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
    what = _packed(file, kind) if kind else _known(head) or _marked(file) or _unknown(head)
    raise BootError(f"{file.name} {what}")


def _marked(file: InputFile | FilePart) -> str | None:
    """What a file is that has a format's mark anywhere."""
    from vmm.boot import kinds

    what = kinds.kind_of(file)
    return f"is {what}; {kinds.instead_of_kernel(what)}" if what else None


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
        return (
            "is a program for UEFI or Windows (PE) without a Linux kernel in it; give it a bzImage "
            "or vmlinux"
        )
    if head[:6] in _CPIO_MAGICS or head[:2] == b"\xc7\x71":
        return "is an initrd (a cpio archive); give it with --initrd, and a kernel first"
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


def _packed(file: InputFile | FilePart, kind: str) -> str:
    """What is in a compressed file, as far as its first block tells."""
    try:
        content = next(decompress.blocks(file.read(0, _PEEK), kind), b"")[:HEADER_END_MIN]
    except BootError:  # broken, or no library for it
        content = b""
    if content[:6] in _CPIO_MAGICS:
        return f"is an initrd (a {kind} cpio archive); give it with --initrd, and a kernel first"
    if content[:4] == b"\x7fELF":
        return f"is an ELF file packed with {kind}; unpack it first: {_UNPACK[kind]} FILE > vmlinux"
    known = content and _known(content)
    if known:
        return f"is {kind} data, and what is in it {known}"
    return f"is {kind} data: an initrd goes to --initrd, a packed kernel must be unpacked first"

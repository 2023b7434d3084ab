"""Whether Linux can make anything of a file as an initrd.

It takes cpio archives (newc), any of them packed with what lib/decompress.c knows, several one
after the other, zeroes between them; or the image of a file system for /dev/ram. Data without a
mark known here are let pass.
"""

from __future__ import annotations

from vmm.boot import decompress
from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.boot.file import FilePart, InputFile

WHAT = "Linux takes a cpio archive (find . | cpio -o -H newc), packed or not"
HEAD = 4096
TRIED_MAX = {"gzip": 2 << 20, "xz": 256 << 10}
"""Bytes of an archive that is unpacked to see whether it is whole: 20 ms at most."""
UNPACKED_MAX = 64 << 20
_LZ4_FRAME = b"\x04\x22\x4d\x18"
_TEXT = bytes(range(0x20, 0x7F)) + b"\t\r\n\f"


def check(file: InputFile | FilePart) -> None:
    """Pass, or BootError in a line."""
    head = file.read(0, HEAD)
    wrong = _wrong(file, head)
    if wrong:
        raise BootError(f"{file.name} {wrong}")


def _wrong(file: InputFile | FilePart, head: bytes) -> str | None:
    start = head.lstrip(b"\0")
    if start[:6] in (b"070701", b"070702") or not start:
        return None
    if start[:6] == b"070707" or head[:2] in (b"\xc7\x71", b"\x71\xc7"):
        return "is a cpio archive in an old format, which Linux does not take; make it with -H newc"
    if head[:4] == _LZ4_FRAME:
        return "is packed with lz4's frame format, which Linux does not take; pack it with lz4 -l"
    kind = decompress.detect(head)
    if kind is not None:
        return _cut(file, kind)
    if head[:4] == b"\x7fELF":
        return f"is an ELF file (a kernel, a program or a module), not an initrd; {WHAT}"
    if head[0x202:0x206] == b"HdrS":
        return f"is a kernel (bzImage), not an initrd; {WHAT}"
    if head[:2] == b"MZ":
        return f"is a program for UEFI or Windows (PE), not an initrd; {WHAT}"
    if head[:2] == b"#!":
        return f"is a script, not an initrd; {WHAT}"
    from vmm.boot import kinds

    what = kinds.kind_of(file)
    if what in kinds.RAMDISKS:
        return None
    if what is not None:
        disk = what.startswith(("a disk", "a file system", "an encrypted", "a CD"))
        return f"is {what}, not an initrd; " + ("give it with --drive" if disk else WHAT)
    if head[0x1FE:0x200] == b"\x55\xaa":
        return "is a disk image or boot sector, not an initrd; give it with --drive"
    if not head.translate(None, _TEXT):
        return f"is a text file, not an initrd; {WHAT}"
    return None


def _cut(file: InputFile | FilePart, kind: str) -> str | None:
    """What is wrong with packed data, as far as that is found in little time."""
    if file.size > TRIED_MAX.get(kind, 0):
        return None
    total = 0
    try:
        for block in decompress.blocks(file.read(0, file.size), kind):
            total += len(block)
            if total > UNPACKED_MAX:
                break
    except BootError as err:
        return f"cannot be unpacked: {err}"
    return None

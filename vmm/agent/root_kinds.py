"""Files given as `--root` that hold no root file system: what each is, and what would work."""

from __future__ import annotations

import shlex

from vmm.block.probe import COMPRESSED

UNPACKED = {"gzip": "gunzip", "xz": "unxz", "bzip2": "bunzip2", "zstd": "unzstd"}
_TAR, _CPIO = (257, b"ustar"), (0, b"0707")
_OTHERS = (
    (0, b"LUKS\xba\xbe", "is encrypted (LUKS); open it (cryptsetup open), and give what it holds"),
    (512, b"LABELONE", "is an LVM volume; give the logical volume with the file system"),
    (4086, b"SWAPSPACE2", "is swap space"),
    (3, b"NTFS    ", "has an NTFS file system, which cannot be a Linux guest's root"),
    (3, b"EXFAT   ", "has an exFAT file system, which cannot be a Linux guest's root"),
    (54, b"FAT", "has a FAT file system, which cannot be a Linux guest's root"),
    (82, b"FAT32", "has a FAT file system, which cannot be a Linux guest's root"),
    (0, b"\x7fELF", "is a program or a kernel"),
)
_PARTITIONS = ((512, b"EFI PART"), (4096, b"EFI PART"), (510, b"\x55\xaa"))


def told(path: str, head: bytes, known: str) -> str:
    """What the file at `path` is by its beginning, and what to give; `known` lists file systems."""
    name = shlex.quote(path)
    if _is(head, *_TAR):
        return f"is a tar archive; unpack it: mkdir root && tar -xf {name} -C root, and --root root"
    if _is(head, *_CPIO):
        return (
            f"is a cpio archive, as of an initrd: --initrd {name}; or unpack it, --root DIRECTORY"
        )
    for mark, program in COMPRESSED:
        if head.startswith(mark):
            return _packed(name, program)
    for offset, mark, what in _OTHERS:
        if _is(head, offset, mark):
            return what if ";" in what else f"{what}; give a directory, or an image with: {known}"
    if any(_is(head, *each) for each in _PARTITIONS):
        return (
            f"is a disk with partitions; give an image of the file system alone ({known}), or boot "
            f"from it: --drive {name},snapshot --append root=/dev/vda1 without --root"
        )
    return f"is no image of a file system known here: {known}"


def _is(head: bytes, offset: int, mark: bytes) -> bool:
    return head[offset : offset + len(mark)] == mark


def _packed(name: str, program: str) -> str:
    if program == "zip":
        return f"is a zip archive; unpack it: unzip {name} -d root, and --root root"
    archive = f"tar -xf {name} -C root" if ".t" in name else f"{UNPACKED[program]} {name}"
    if archive.startswith("tar"):
        return f"is a packed archive ({program}); mkdir root && {archive}, and --root root"
    return f"is packed with {program}; unpack it first: {archive}"

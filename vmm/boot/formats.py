"""What kind of file was given as a kernel; each wrong kind has its own message."""

from __future__ import annotations

import errno
import mmap
import os
import stat

from vmm.boot import decompress
from vmm.boot.bzimage import BOOT_FLAG, MAGIC, MAGIC_OFFSET
from vmm.errors import BootError

BZIMAGE, ELF = "bzImage", "ELF"
_ARM64_MAGIC = b"ARM\x64"
_RISCV_MAGIC = b"RSC\x05"
_UIMAGE_MAGIC = b"\x27\x05\x19\x56"


def open_file(path: str, option: str) -> int:
    """Open a regular file to read; BootError names the option and what is wrong with it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as err:
        raise BootError(f"{option} {path}: {_why(err)}") from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise BootError(f"{option} {path} is {what}; give it a file")
    return fd


def map_kernel(path: str) -> tuple[mmap.mmap, str]:
    """Map a kernel file and say what it is: BZIMAGE or ELF.

    Raises:
        BootError: it is something else; says what.
    """
    fd = open_file(path, "kernel")
    try:
        size = os.fstat(fd).st_size
        if not size:
            raise BootError(f"kernel {path} is empty")
        data = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    except OSError as err:
        raise BootError(f"kernel {path}: {_why(err)}") from None
    finally:
        os.close(fd)
    try:
        return data, identify(data, path)
    except BaseException:
        data.close()
        raise


def identify(data: mmap.mmap | bytes, path: str) -> str:
    """BZIMAGE or ELF, by the magics; BootError says what else it is."""
    if data[:4] == b"\x7fELF":
        return ELF
    has_flag = data[0x1FE:0x200] == BOOT_FLAG.to_bytes(2, "little")
    if data[MAGIC_OFFSET : MAGIC_OFFSET + 4] == MAGIC and has_flag:
        return BZIMAGE
    raise BootError(f"kernel {path} {_wrong(data)}")


def _wrong(data: mmap.mmap | bytes) -> str:
    head = bytes(data[:64])
    if head[0x38:0x3C] == _ARM64_MAGIC:
        return "is an arm64 Image; this boots x86-64 kernels"
    if head[0x38:0x3C] == _RISCV_MAGIC:
        return "is a RISC-V Image; this boots x86-64 kernels"
    if head[:2] == b"MZ":
        if len(data) < 0x268:
            return "is truncated: it starts like a bzImage and ends before its setup header does"
        return "is a PE program without a Linux kernel's magic; give it a bzImage or vmlinux"
    if head[:6] in (b"070701", b"070702"):
        return "is an initrd (a cpio archive); give it with --initrd, and a kernel first"
    if head[:4] == _UIMAGE_MAGIC:
        return "is a U-Boot uImage; give it the bzImage or vmlinux it was made from"
    kind = decompress.detect(head)
    if kind is not None:
        return (
            f"is {kind} data: a compressed initrd (give it with --initrd), or a packed kernel "
            "(unpack it first)"
        )
    if head[:2] == b"#!":
        return "is a script; give it a bzImage or vmlinux"
    if head[:8] == b"!<arch>\n":
        return "is a package or archive; unpack it (dpkg -x) and give it boot/vmlinuz-*"
    if not head.strip(b"\0"):
        return "is all zeroes where a kernel begins"
    return "is not a kernel this can boot: neither a bzImage nor an ELF vmlinux"


def _why(err: OSError | ValueError) -> str:
    if isinstance(err, ValueError):
        return "not a possible file name"
    hints = {
        errno.ENOENT: "no such file",
        errno.EACCES: "no permission to read it",
        errno.ELOOP: "too many symbolic links",
        errno.ENOTDIR: "a part of the path is not a directory",
    }
    return hints.get(err.errno or 0, os.strerror(err.errno or 0))

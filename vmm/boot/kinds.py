"""What files are, by the marks that formats put into them. Loaded when something is wrong.

Each answer is a phrase that follows "is"; what would work instead is the caller's to say.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.boot.file import FilePart, InputFile

_MAGICS = (
    # (offset, bytes, what it is); longer marks before shorter ones at a place.
    (0, b"QFI\xfb", "a disk image (qcow2)"),
    (0, b"QED\0", "a disk image (QED)"),
    (0, b"KDMV", "a disk image (VMDK)"),
    (0, b"# Disk DescriptorFile", "a disk image's descriptor (VMDK)"),
    (0, b"vhdxfile", "a disk image (VHDX)"),
    (0, b"conectix", "a disk image (VHD)"),
    (0, b"WithoutFreeSpace", "a disk image (Parallels)"),
    (0, b"WithouFreSpacExt", "a disk image (Parallels)"),
    (0x40, b"\x7f\x10\xda\xbe", "a disk image (VDI)"),
    (0, b"LUKS\xba\xbe", "an encrypted disk (LUKS)"),
    (0x8001, b"CD001", "a CD image (ISO 9660)"),
    (0x200, b"EFI PART", "a disk image with partitions (GPT)"),
    (0, b"hsqs", "a file system (squashfs)"),
    (0x400, b"\xe2\xe1\xf5\xe0", "a file system (EROFS)"),
    (0, b"XFSB", "a file system (XFS)"),
    (0x438, b"\x53\xef", "a file system (ext2, ext3 or ext4)"),
    (0x10040, b"_BHRfS_M", "a file system (btrfs)"),
    (0, b"\xed\xab\xee\xdb", "a package (RPM)"),
    (0, b"!<arch>\ndebian-binary", "a package (Debian)"),
    (0, b"!<arch>\n", "an archive of object files (ar)"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0x101, b"ustar", "a tar archive"),
    (0, b"\x27\x05\x19\x56", "a U-Boot uImage"),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or FIT image"),
    (0x28, b"_FVH", "firmware (UEFI)"),
)
RAMDISKS = ("a file system (squashfs)", "a file system (ext2, ext3 or ext4)")
"""File systems that Linux takes as an initrd, too (init/do_mounts_rd.c)."""

_KIB = 1 << 10
_FAR_JUMP = b"\xea\x5b\xe0\x00\xf0"
"""What a PC's BIOS has 16 bytes before its end: a jump to f000:e05b."""
_UEFI_RESET = b"\x90\x90\xe9"
"""What OVMF has there (OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm)."""


def kind_of(file: InputFile | FilePart) -> str | None:
    """What `file` is, as far as a mark tells."""
    for offset, magic, what in _MAGICS:
        if file.read(offset, len(magic)) == magic:
            return what
    if not file.size % (64 * _KIB) and file.size <= 64 << 20:
        reset = file.read(file.size - 16, 5)
        if reset == _FAR_JUMP or reset.startswith(_UEFI_RESET):
            return "firmware (a BIOS or UEFI)"
    return None


def instead_of_kernel(what: str) -> str:
    """What would work for a person who gave `what` as a kernel."""
    if what.startswith(("a disk image", "an encrypted disk", "a file system")):
        return "give it with --drive, and a kernel (bzImage or vmlinux) first"
    if what.startswith("a CD image"):
        return (
            "give the vmlinuz in it (7z x, or mount -o loop), its initrd with --initrd, and the "
            "image with --drive FILE,readonly"
        )
    if what.startswith("firmware"):
        return (
            "this monitor needs none: give it a kernel (bzImage or vmlinux), which starts at once"
        )
    if what.startswith("a package"):
        return "unpack it (dpkg -x, rpm2cpio) and give boot/vmlinuz-* or lib/modules/*/vmlinuz"
    if what.startswith("a U-Boot"):
        return "give it the bzImage or vmlinux it was made from"
    return "give it a bzImage or vmlinux"

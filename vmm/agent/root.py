"""A throw-away root file system: a host's directory or a disk image, neither of which is changed.

The directory comes by virtio-fs, the image as a virtio disk with a snapshot; what the guest writes
is in its memory, or in a file without a name, and is gone with it.
"""

from __future__ import annotations

import os
import shlex

from vmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.block.drive import Drive
    from vmm.virtio.fs import Share

NAME = "vmm-root"
"""The directory's tag, the disk's serial number."""
_MAGIC = (
    (0x438, b"\x53\xef", "ext4"),
    (0, b"XFSB", "xfs"),
    (0x10040, b"_BHRfS_M", "btrfs"),
    (0, b"hsqs", "squashfs"),
    (0x400, b"\xe2\xe1\xf5\xe0", "erofs"),
    (0x8001, b"CD001", "iso9660"),
    (0x400, b"\x10\x20\xf5\xf2", "f2fs"),
)
_READ_ONLY = ("squashfs", "erofs", "iso9660")
_MODULES = {"iso9660": "isofs"}


class Root:
    """What `root=` says, looked at.

    Attributes:
        share, drive: what the machine gets for it; one of them is None.
        lines: what the agent is told (vmm/agent/init.c).
        wanted: the modules it takes.
    """

    __slots__ = ("drive", "lines", "path", "share", "wanted")

    def __init__(self, path: str) -> None:
        self.path = path
        self.share: Share | None = None
        self.drive: Drive | None = None
        if os.path.isdir(path):
            from vmm.virtio.fs import Share

            self.share = Share(path, tag=NAME, readonly=True)
            self.lines = [f"root virtiofs {NAME}", "overlay"]
            if os.geteuid():  # only this user's files have their owner (vmm.virtio.fs_sandbox)
                self.lines.append("nosuid")
            self.wanted = ["virtiofs", "overlay"]
            return
        from vmm.block.drive import Drive

        kind = file_system(path)
        self.drive = Drive(path, format="raw", snapshot=True, serial=NAME)
        self.lines = [f"root {NAME} {kind}"]
        self.wanted = ["virtio_blk", _MODULES.get(kind, kind)]
        if kind in _READ_ONLY:
            self.lines.append("overlay")
            self.wanted.append("overlay")


def image_format(path: str) -> str:
    """The format of an image, by its mark."""
    from vmm.block.probe import detect

    with open(path, "rb", buffering=0) as file:
        return detect(file.fileno(), os.fstat(file.fileno()).st_size)


def file_system(path: str) -> str:
    """The file system in an image, as mount(8) calls it. Raises UsageError."""
    try:
        with open(path, "rb") as file:
            head = file.read(0x10100)
    except OSError as err:
        raise UsageError(
            f"--root {path}: {err.strerror}; give a directory, or an image of a file system"
        ) from None
    for offset, magic, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return name
    format = image_format(path)
    if format != "raw":
        raise UsageError(
            f"--root {path} is a {format} image; make it raw: "
            f"qemu-img convert -O raw {shlex.quote(path)} root.img"
        )
    known = ", ".join(name for _, _, name in _MAGIC)
    if head[510:512] == b"\x55\xaa":
        raise UsageError(
            f"--root {path} is a disk with partitions; give an image of the file system alone "
            f"({known})"
        )
    raise UsageError(f"--root {path} is no image of a file system known here: {known}")

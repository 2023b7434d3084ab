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
    from collections.abc import Sequence
    from typing import Literal

    from vmm.block.drive import Drive
    from vmm.virtio.fs import Share

NAME = "vmm-root"
"""The directory's tag, the disk's serial number."""
DIRECTORY = "vmm-dir-"
"""How the tags of the other directories begin."""
_MAGIC = (
    (0x438, b"\x53\xef", "ext4"),
    (0, b"XFSB", "xfs"),
    (0x10040, b"_BHRfS_M", "btrfs"),
    (0, b"hsqs", "squashfs"),
    (0x400, b"\xe2\xe1\xf5\xe0", "erofs"),
    (0x8001, b"CD001", "iso9660"),
    (0x400, b"\x10\x20\xf5\xf2", "f2fs"),
)
KERNELS = ("proc", "sys", "dev")
"""Directories that are the guest's kernel's; GUESTS: that are in its memory besides."""
GUESTS = ("run", "tmp")
DIRECTORIES_MAX = 64
LINES_MAX = 48 << 10
"""Bytes of the lines for the agent, which takes 64 KiB with those for modules and networks."""
SECTOR = 512
HEAD = 0x10100
"""Bytes of an image that are looked at."""
_READ_ONLY = ("squashfs", "erofs", "iso9660")
_MODULES = {"iso9660": "isofs"}


class Root:
    """What `root=` says, looked at.

    Attributes:
        share, drive: what the machine gets for it; one of them is None.
        shares: all directories by virtio-fs: the root's, then those of `rw` and `overlay`.
        lines: what the agent is told (vmm/agent/init.c).
        wanted: the modules it takes.
    """

    __slots__ = ("drive", "lines", "path", "share", "shares", "wanted")

    def __init__(self, path: str, rw: Sequence[str] = (), overlay: Sequence[str] = ()) -> None:
        self.path = path
        self.share: Share | None = None
        self.drive: Drive | None = None
        self._look(path)
        self.shares: tuple[Share, ...] = (self.share,) if self.share is not None else ()
        if rw or overlay:
            self._add(directories(rw, overlay))

    def _add(self, found: dict[str, str]) -> None:
        """Directories of the host at the same path in the guest, those above others first."""
        from vmm.virtio.fs import Share

        for number, (path, mode) in enumerate(sorted(found.items())):
            tag = f"{DIRECTORY}{number}"
            self.shares += (Share(path, tag=tag, readonly=mode == "overlay"),)
            self.lines.append(f"mount {tag} {mode} {path}")
            size = sum(len(os.fsencode(line)) + 1 for line in self.lines)
            if size > LINES_MAX:
                raise UsageError(
                    f"--rw and --overlay: their paths have more than {LINES_MAX} bytes together"
                )
        self.wanted.append("virtiofs")
        if "overlay" in found.values():
            self.wanted.append("overlay")

    def _look(self, path: str) -> None:
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
        _check_size(path, kind)
        self.drive = Drive(path, format="raw", snapshot=True, serial=NAME)
        self.lines = [f"root {NAME} {kind}"]
        self.wanted = ["virtio_blk", _MODULES.get(kind, kind)]
        if kind in _READ_ONLY:
            self.lines.append("overlay")
            self.wanted.append("overlay")


def check_names(shares: Sequence[Share], drives: Sequence[Drive]) -> None:
    """UsageError: one has a name that the agent looks for: it would be taken for the root."""
    for share in shares:
        if share.tag == NAME or share.tag.startswith(DIRECTORY):
            raise UsageError(f"--fs {share.path}: tag={share.tag} is the agent's; say another")
    for drive in drives:
        if drive.serial == NAME:
            raise UsageError(f"--drive {drive.path}: serial={NAME} is the agent's; say another")


def image_format(path: str) -> str:
    """The format of an image, by its mark."""
    from vmm.block.probe import detect
    from vmm.fifo import open_stored

    with open_stored(path) as file:
        return detect(file.fileno(), os.fstat(file.fileno()).st_size)


def directories(rw: Sequence[str], overlay: Sequence[str]) -> dict[str, str]:
    """The real paths of what --rw and --overlay name, and `rw` or `overlay`. Raises UsageError."""
    found: dict[str, str] = {}
    for mode, paths in (("rw", rw), ("overlay", overlay)):
        for path in paths:
            option, real = f"--{mode} {path}", os.path.realpath(path)
            if not path:
                raise UsageError(f"--{mode}: no directory; --{mode} . is the one you are in")
            if not os.path.isdir(real):
                raise UsageError(f"{option}: no such directory")
            if real in found:
                other = " and --".join(dict.fromkeys((found[real], mode)))
                raise UsageError(f"{option}: the directory is given twice (--{other})")
            if real == "/" or "\n" in real:
                what = "is all of the host" if real == "/" else "has a line break in its name"
                raise UsageError(f"{option} {what}; give the directory that is to be written to")
            top = real.split("/", 2)[1]
            if top in KERNELS:
                raise UsageError(f"{option}: /{top} is the guest's own; give another directory")
            found[real] = mode
    if len(found) > DIRECTORIES_MAX:
        raise UsageError(f"--rw and --overlay: at most {DIRECTORIES_MAX} directories")
    return found


def keeps(root: str, directories: Sequence[str], path: str) -> bool:
    """Whether a directory of the host is at the same path in the guest."""
    for directory in map(os.path.realpath, directories):
        if path == directory or path.startswith(f"{directory}/"):
            return True
    return os.path.realpath(root) == "/" and path.split("/", 2)[1] not in KERNELS + GUESTS


def file_system(path: str) -> str:
    """The file system in an image, as mount(8) calls it. Raises UsageError."""
    try:
        head = read_head(path)
    except OSError as err:
        raise UsageError(
            f"--root {path}: {err.strerror}; give a directory, or an image of a file system"
        ) from None
    if (name := told_from(head)) is not None:
        return name
    format = image_format(path)
    if format != "raw":
        raise UsageError(
            f"--root {path} is a {format} image; make it raw: "
            f"qemu-img convert -O raw {shlex.quote(path)} root.img"
        )
    known = ", ".join(name for _, _, name in _MAGIC)
    from vmm.agent import root_kinds

    raise UsageError(f"--root {path} {root_kinds.told(path, head, known)}")


def _check_size(path: str, name: str) -> None:
    """UsageError: the image is shorter than the file system in it, or no disk can be so long."""
    from vmm.fifo import open_stored

    with open_stored(path) as file:
        needed = size_told(name, file.read(HEAD))
        size = file.seek(0, os.SEEK_END)
    if size < needed:
        raise UsageError(
            f"--root {path} is cut short: it has {size} bytes, and the {name} in it {needed}"
        )
    if size % SECTOR:
        raise UsageError(
            f"--root {path} has {size} bytes, which is not whole sectors of {SECTOR}; add zeroes: "
            f"truncate -s %{SECTOR} {shlex.quote(path)}"
        )


def size_told(name: str, head: bytes) -> int:
    """Bytes that a file system says it has, by the beginning of its image; 0: it is not known."""

    def field(offset: int, size: int, order: Literal["little", "big"] = "little") -> int:
        return int.from_bytes(head[offset : offset + size], order)

    if name == "ext4":  # s_blocks_count, s_log_block_size; INCOMPAT_64BIT: s_blocks_count_hi
        high = field(0x550, 4) << 32 if field(0x460, 4) & 0x80 else 0
        return (high | field(0x404, 4)) << 10 + min(field(0x418, 4), 6)
    if name == "xfs":  # sb_dblocks, sb_blocksize
        return field(8, 8, "big") * field(4, 4, "big")
    if name == "squashfs":  # bytes_used
        return field(40, 8)
    return 0


def read_head(path: str) -> bytes:
    """As much of an image as `told_from` looks at. Raises OSError."""
    from vmm.fifo import open_stored

    with open_stored(path) as file:
        return file.read(HEAD)


def told_from(head: bytes) -> str | None:
    """The file system whose beginning this is, as mount(8) calls it."""
    for offset, magic, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return name
    return None


def modules_of(kind: str) -> str:
    """The kernel module of a file system."""
    return _MODULES.get(kind, kind)

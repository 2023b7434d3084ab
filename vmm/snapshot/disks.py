"""What becomes of a machine's disks in a snapshot: copied (by reflink where that works), or left.

A copy is a sparse raw image, whatever is under the machine's disk (an overlay, a device).
"""

from __future__ import annotations

import copy
import fcntl
import os
import stat

from vmm.block.overlay import Overlay
from vmm.block.raw import RawImage
from vmm.errors import SnapshotError, StateError
from vmm.snapshot.index import CHUNK, Index, crc, data_runs
from vmm.snapshot.manifest import KEEP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from vmm.block.drive import Drive
    from vmm.machine import Machine
    from vmm.virtio.blk import Block, Image

HOW = ("copy", "keep")
"""`copy` falls back from reflinks to copying; `keep` leaves the images where they are."""
USES = ("overlay", "write")
FICLONE = 0x40049409
REFLINK, COPY = "reflink", "copy"


def images(machine: Machine) -> list[tuple[Block, Drive]]:
    """The machine's disks, those of its drives first, then its root. Raises StateError."""
    from vmm.virtio.blk import Block

    config, virtio = machine.config, machine.platform.virtio
    devices = [] if virtio is None else [transport.device for transport in virtio.transports]
    root = config.root_parts
    drives = config.drives
    if root is not None and root.drive is not None:
        drives += (root.drive,)
    disks: list[tuple[Block, Drive]] = []
    for device, drive in zip(devices, drives, strict=False):
        if not isinstance(device, Block):
            raise StateError(
                f"snapshot: {drive.path} is served by another process (format={drive.format}), "
                "whose state cannot be saved; give the drive a serial=, and this one serves it"
            )
        if device.faults is not None:
            raise StateError(
                f"snapshot: {device.name} has faults set, or a volatile cache; clear() and "
                "durable() end them"
            )
        disks.append((device, drive))
    return disks


def save(machine: Machine, directory: str, how: str) -> list[dict[str, Any]]:
    """Put the disks of a machine that is still into `directory`; what the manifest says of each."""
    return [
        _save(block, drive, directory, f"disk{number}", how)
        for number, (block, drive) in enumerate(images(machine))
    ]


def _save(block: Block, drive: Drive, directory: str, name: str, how: str) -> dict[str, Any]:
    path = os.path.abspath(drive.path)
    told: dict[str, Any] = {"path": path, "size": block.image.size}
    if drive.readonly or how == KEEP:
        if isinstance(block.image, Overlay) and not block.image.empty:
            raise StateError(
                f"snapshot: disks=keep: {drive.path} is under a throw-away overlay "
                "(snapshot), which goes with the machine; use disks=copy"
            )
        block.image.flush()
        info = os.stat(path)
        return {**told, "how": KEEP, "mtime": info.st_mtime_ns, "stored": info.st_size}
    fd = os.open(os.path.join(directory, name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if _reflink(block.image, fd):
            os.fsync(fd)
            return {**told, "how": REFLINK, "file": name}
        index = _copy(block.image, fd)
        os.fsync(fd)
    finally:
        os.close(fd)
    with open(os.path.join(directory, name + ".index"), "wb") as file:
        file.write(index.pack())
    return {**told, "how": COPY, "file": name, "index": name + ".index"}


def _reflink(image: Image, fd: int) -> bool:
    """Share the image's blocks (ioctl_ficlonerange(2)); False where that is not possible."""
    if not isinstance(image, RawImage) or image.is_device:
        return False
    try:
        fcntl.ioctl(fd, FICLONE, image.fd)
    except OSError:  # another file system, or one without reflinks
        return False
    return True


def _copy(image: Image, fd: int) -> Index:
    os.ftruncate(fd, image.size)
    sums: dict[int, int] = {}
    buffer = memoryview(bytearray(CHUNK))
    last = -1
    for start, end in _data(image):
        for number in range(start // CHUNK, -(-end // CHUNK)):
            if number <= last:
                continue
            last = number
            part = buffer[: min(CHUNK, image.size - number * CHUNK)]
            image.read([part], number * CHUNK)
            found = crc(part)
            if found:
                sums[number] = found
                _write(fd, part, number * CHUNK)
    return Index(sums, [])


def _write(fd: int, part: memoryview, offset: int) -> None:
    while part:
        done = os.pwrite(fd, part, offset)
        part, offset = part[done:], offset + done


def _data(image: Image) -> Iterator[tuple[int, int]]:
    """(start, end) of what of it may not be zero."""
    if isinstance(image, RawImage) and stat.S_ISREG(os.fstat(image.fd).st_mode):
        yield from data_runs(image.fd, image.size)
    else:
        yield 0, image.size


# --- restoring ------------------------------------------------------------------------------------


def check(
    directory: str, disks: Sequence[Mapping[str, Any]], made_with: Sequence[Drive], root: bool
) -> None:
    """Whether each disk is what it was, and there is one for each of the drives that the machine
    was made with (and for its root image, if it has one). Raises SnapshotError."""
    if not len(made_with) <= len(disks) <= len(made_with) + root:
        raise SnapshotError(
            f"{directory}: its machine has {len(made_with)} drives, and {len(disks)} disks are in "
            "its manifest"
        )
    for disk, drive in zip(disks, made_with, strict=False):
        if disk["how"] == KEEP and disk["path"] != os.path.abspath(drive.path):
            raise SnapshotError(
                f"{directory}: its disk {disk['path']} is another than its machine's drive "
                f"{drive.path}"
            )
    for disk in disks:
        if disk["how"] != KEEP:
            continue
        try:
            info = os.stat(disk["path"])
        except OSError as err:
            raise SnapshotError(f"{directory}: its disk {disk['path']}: {err.strerror}") from None
        if stat.S_ISREG(info.st_mode) and (
            info.st_size != disk.get("stored", disk["size"]) or info.st_mtime_ns != disk["mtime"]
        ):
            raise SnapshotError(
                f"{directory}: its disk {disk['path']} was written to since; the guest would find "
                "another file system than it remembers (make snapshots with disks=copy)"
            )


def drives(
    directory: str, disks: Sequence[Mapping[str, Any]], made_with: Sequence[Drive], use: str
) -> list[Drive]:
    """The drives of a restored machine: over throw-away overlays, or writing to the files."""
    found = []
    for disk, drive in zip(disks, made_with, strict=False):  # after them, there may be the root
        made = copy.copy(drive)
        made.path = path_of(directory, disk)
        if disk["how"] != KEEP:
            made.format, made.backing, made.data_file = "raw", (), ""
            made.inside = True
        if not made.readonly:
            made.snapshot = use == "overlay"
        found.append(made)
    return found


def path_of(directory: str, disk: Mapping[str, Any]) -> str:
    """Where the disk's contents are now."""
    return os.path.join(directory, disk["file"]) if disk["how"] != KEEP else str(disk["path"])

"""What qemu-storage-daemon is told to open for a drive: the image, and what lies below it.

Each file is looked at before the daemon is started: what cannot be opened, or is in another format,
or names files that the person has not named, is refused here.
"""

from __future__ import annotations

import os

from vmm.block import header as headers
from vmm.block import lock, probe
from vmm.block.host_file import HostFile
from vmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.block.drive import Drive
    from vmm.block.header import Header

    Node = dict[str, Any]

DISK = "disk"
"""The name of the node that is the disk."""
FREE_WITHIN = 2.0
"""Seconds to wait for an image in use: a killed monitor's daemon is about to let it go."""
CHAIN_MAX = 100
"""Backing files below an image."""


def nodes(drive: Drive, files: list[tuple[str, bool]] | None = None) -> list[Node]:
    """The block nodes of `drive`, each after those it is made of: the arguments of the daemon's
    `--blockdev`. All files that it opens for them, and whether to write, are added to `files`.
    Raises UsageError, HostError."""
    if len(drive.backing) > CHAIN_MAX:
        raise UsageError(f"--drive {drive.path}: backing= more than {CHAIN_MAX} times")
    readonly = drive.readonly or drive.snapshot
    file = HostFile(
        drive.path, readonly=readonly, direct=drive.cache == "none", format=drive.format
    )
    try:
        limit_free(drive, file, write=not readonly)
        fd = probe.readable(file.fd)
        try:
            header = headers.read(fd, drive.format, drive.path)
        finally:
            os.close(fd)
    finally:
        os.close(file.fd)
    if header.encrypted:
        raise UsageError(
            f"--drive {drive.path}: this {drive.format} image is encrypted, and no option takes "
            "its key; give a copy that is not, or have the guest encrypt a raw disk"
        )
    _check_backing(drive, header)
    extents: list[tuple[str, bool]] = []
    made = _backing(drive, header, extents)
    extra: Node = {"backing": f"backing{len(drive.backing)}" if drive.backing else None}
    if drive.format not in probe.LAYERED:
        extra = {}
    if header.data_file or (drive.data_file and drive.format == "qcow2"):
        made.append(_data_file(drive, header, readonly))
        extra["data-file"] = "data"
    if drive.format == "vmdk":
        extents += [(each, not readonly) for each in _check_extents(drive, header)]
    made.append(_protocol(drive, "file", drive.path, file.is_device, readonly))
    if files is not None:
        files += extents
        files += [(each["filename"], not each["read-only"]) for each in made if "filename" in each]
    return [
        *made,
        {**_common(drive, DISK, readonly), "driver": drive.format, "file": "file", **extra},
    ]


def limit_free(drive: Drive, file: HostFile, *, write: bool) -> None:
    """Wait until nobody uses the image, not for long. Raises HostError."""
    lock.wait_free(drive.path, write=write, within=FREE_WITHIN)
    if not lock.free(file.fd, write=write):
        raise lock.in_use(drive.path, file.fd, write=write)


def _common(drive: Drive, name: str, readonly: bool) -> Node:
    return {
        "node-name": name,
        "read-only": readonly,
        "cache": {"direct": drive.cache == "none", "no-flush": drive.cache == "unsafe"},
        "discard": "ignore" if drive.discard == "off" else "unmap",
    }


def _protocol(drive: Drive, name: str, path: str, is_device: bool, readonly: bool) -> Node:
    driver = "host_device" if is_device else "file"
    return {**_common(drive, name, readonly), "driver": driver, "filename": path}


# --- backing files --------------------------------------------------------------------------------


def _resolved(path: str, name: str) -> str:
    """The file that the image at `path` means by `name`; empty: it means no file of this host."""
    if name.partition("/")[0].find(":") >= 0:
        return ""
    return os.path.join(os.path.dirname(path), name)


def _check_backing(drive: Drive, header: Header) -> None:
    """Whether the image has a backing file where, and only where, the person names one."""
    if header.backing and not drive.backing:
        raise _unnamed(drive, drive.path, "lies over", header.backing, "backing")
    if drive.backing and not header.backing:
        raise UsageError(
            f"--drive {drive.path}: backing={drive.backing[0]}, but the image has no backing file; "
            "leave it out"
        )


def _unnamed(drive: Drive, path: str, how: str, name: str, key: str) -> UsageError:
    """What to say of a file that only a header names."""
    shown = name if name.isprintable() else repr(name)
    file = _resolved(path, name)
    whose = "" if path == drive.path else f"its backing file {path} "
    text = f"--drive {drive.path}: {whose}{'the image ' if not whose else ''}{how} {shown}, as its "
    if not file:
        return UsageError(
            f"{text}header says, which is not opened; make an image without it: "
            "qemu-img convert -O qcow2 OLD NEW"
        )
    if not file.isprintable():
        file = repr(file)
    return UsageError(
        f"{text}header says; if it may be opened, add {key}={file.replace(',', ',,')}"
    )


def _backing(drive: Drive, top: Header, extents: list[tuple[str, bool]]) -> list[Node]:
    """The nodes of the backing files, the lowest first: `backingN`, the nearest with the highest
    number."""
    made: list[Node] = []
    count = len(drive.backing)
    told, below = top, None
    found: list[tuple[str, str, bool]] = []
    for number, path in enumerate(drive.backing):
        file = HostFile(path, readonly=True, direct=drive.cache == "none", format="raw")
        try:
            if not lock.free(file.fd, write=False):
                raise lock.in_use(path, file.fd, write=False)
            mark = probe.detect(file.fd, file.size)
            format = "raw" if told.backing_format == "raw" else mark
            fd = probe.readable(file.fd)
            try:
                told = headers.read(fd, format, path)
            finally:
                os.close(fd)
        finally:
            os.close(file.fd)
        if format == "vmdk":
            extents += [(each, False) for each in _check_extents(drive, told, path)]
        if told.data_file:
            raise _unnamed(drive, path, "keeps its data in", told.data_file, "data-file")
        if told.backing and number + 1 == count:
            raise _unnamed(drive, path, "lies over", told.backing, "backing")
        if not told.backing and number + 1 < count:
            raise UsageError(
                f"--drive {drive.path}: backing={drive.backing[number + 1]}, but {path} has no "
                "backing file; leave it out"
            )
        found.append((path, format, file.is_device))
    for number, (path, format, is_device) in enumerate(reversed(found), 1):
        name = f"backing{number}"
        made.append(_protocol(drive, f"{name}-file", path, is_device, True))
        node = {**_common(drive, name, True), "driver": format, "file": f"{name}-file"}
        if format in probe.LAYERED:
            node["backing"] = below
        made.append(node)
        below = name
    return made


# --- data files and extents -----------------------------------------------------------------------


def _data_file(drive: Drive, header: Header, readonly: bool) -> Node:
    if not drive.data_file:
        raise _unnamed(drive, drive.path, "keeps its data in", header.data_file, "data-file")
    if not header.data_file:
        raise UsageError(
            f"--drive {drive.path}: data-file={drive.data_file}, but the image keeps its data "
            "itself; leave it out"
        )
    file = HostFile(drive.data_file, readonly=readonly, format="raw")
    try:
        limit_free(drive, file, write=not readonly)
    finally:
        os.close(file.fd)
    return _protocol(drive, "data", drive.data_file, file.is_device, readonly)


def _check_extents(drive: Drive, header: Header, path: str = "") -> list[str]:
    """The files of a VMDK descriptor's extents, each of which is, or lies in, what `data-file=`
    says. Raises UsageError."""
    path = path or drive.path
    allowed = os.path.realpath(drive.data_file) if drive.data_file else ""
    found = []
    for _, name in header.extents:
        file = _resolved(path, name)
        real = os.path.realpath(file) if file else ""
        if not real or not allowed or allowed not in (real, os.path.dirname(real)):
            raise _unnamed(drive, path, "keeps its data in", name, "data-file")
        found.append(real)
        extent = HostFile(real, readonly=True, format="raw")
        try:
            if probe.detect(extent.fd, extent.size) == "vmdk":
                inner = headers.read(extent.fd, "vmdk", real)
                if inner.extents:
                    raise UsageError(
                        f"--drive {drive.path}: its extent {real} is a descriptor of other files"
                    )
        finally:
            os.close(extent.fd)
    if drive.data_file and not header.extents and drive.format == "vmdk" and path == drive.path:
        raise UsageError(
            f"--drive {drive.path}: data-file={drive.data_file}, but the image keeps its data "
            "itself; leave it out"
        )
    return found
